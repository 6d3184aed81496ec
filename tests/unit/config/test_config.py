"""The recipe: impossible values and combinations, lists per iteration, precision."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from spin_ray.config.load import override, parse_config
from spin_ray.config.recipe import IterationSettings, SpinConfig
from spin_ray.config.sections import Section
from spin_ray.errors import ConfigError
from tests.support.fakes import MINIMAL, config_of
from tests.support.settings import SECTIONS


def parse(**sections: Any) -> SpinConfig:
    return parse_config(MINIMAL | sections, source="r.yaml")


def problems(**sections: Any) -> str:
    """Returns the one line of the error without the name of the recipe."""
    with pytest.raises(ConfigError) as caught:
        parse(**sections)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix("r.yaml: ")


# What is wrong, and all of it


def test_defaults_are_those_of_the_paper():
    config = parse()
    assert config.model.max_length == 2048
    assert config.iterations == 4
    assert (config.objective.loss, config.objective.beta, config.objective.window) == ("logistic", 0.1, 2)
    assert (config.train.learning_rate, config.train.epochs, config.train.global_batch_pairs) == (5e-7, 2, 64)
    optimizer = config.train.optimizer
    assert (optimizer.name, optimizer.weight_decay) == ("rmsprop", 0)
    assert (optimizer.schedule, optimizer.warmup_fraction) == ("linear", 0.1)
    sampling = config.generation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


def test_values_and_keys_and_combinations_that_are_wrong_are_all_in_one_error():
    """Two keys, two values; and what is right alone: 3 values of beta for 4 iterations, 1000 < 2048 + 1024 tokens."""
    found = problems(
        evaluation={"answer_extractr": "equals"},
        cluster={"adress": "auto"},
        sft={"epochs": 0},
        generation={"sampling": {"temperature": -1}},
        objective={"beta": [0.1, 0.1, 5.0]},
        train={"pack_length": 1000},
    )
    assert found == (
        "sft.epochs: input should be greater than or equal to 1 (got 0); "
        "generation.sampling.temperature: input should be greater than or equal to 0 (got -1); "
        "evaluation.answer_extractr: unknown key (did you mean answer_extractor?); "
        "cluster.adress: unknown key (did you mean address?); "
        "objective.beta: has 3 values for 4 iterations; give one value or one for each; "
        "train.pack_length: 1000 cannot hold a prompt with both responses; raise it to 3072 "
        "(model.max_length + generation.sampling.max_tokens) or lower those"
    )


def test_a_combination_with_a_wrong_value_is_not_complained_of():
    """The default of 2048 is not what the user meant by ``2k``, so nothing can be said of pack_length 300."""
    assert problems(model={"path": "m", "max_length": "2k"}, train={"pack_length": 300}) == (
        "model.max_length: input should be a valid integer, unable to parse string as an integer (got '2k')"
    )


def test_a_combination_with_a_section_that_has_an_unknown_key_is_not_complained_of():
    """``pack_lenght`` was meant to be the pack length."""
    big = {"path": "m", "max_length": 8000}
    assert problems(model=big, train={"pack_lenght": 10_000}) == (
        "train.pack_lenght: unknown key (did you mean pack_length?)"
    )


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"train": {"workers": True}}, "train.workers: input should be a number (got True)"),
        (
            {"learning_rate": 1e-6},
            "learning_rate: unknown key (did you mean train.learning_rate or sft.learning_rate?)",
        ),
        ({"data.train": "x"}, "data.train: unknown key (write it as data: {train: …})"),
        ({"train.lora.rank": 8}, "train.lora.rank: unknown key (write it as train: {lora: {rank: …}})"),
        ({"seed": True}, "seed: input should be a number (got True)"),
        (
            {"generation": {"sampling": {"top_p": True}}},
            "generation.sampling.top_p: input should be a number (got True)",
        ),
        (
            {"generation": {"engine": {"gpu_memory_utilization": True}}},
            "generation.engine.gpu_memory_utilization: input should be a number (got True)",
        ),
        ({"serving": {"port": True}}, "serving.port: input should be a number (got True)"),
        (
            {"health": {"max_length_change": float("inf")}},
            "health.max_length_change: input should be a finite number (got inf)",
        ),
        ({"train": None}, "train: is empty; give it fields, or leave it out"),
        (
            {"data": {"train": "$HOME/rows.jsonl"}},
            "data.train: $HOME/rows.jsonl: recipes read no variables; write the path, or give --data.train=… on the "
            "command line",
        ),
    ],
)
def test_a_mistake_is_named_with_its_cure(wrong, problem):
    assert problems(**wrong) == problem


def test_missing_sections_do_not_hide_other_problems():
    with pytest.raises(ConfigError) as caught:
        parse_config({"iterations": 2, "objective": {"beta": [1.0]}}, source="r.yaml")
    assert str(caught.value) == (
        "r.yaml: model: field required; data: field required; "
        "objective.beta: has 1 values for 2 iterations; give one value or one for each"
    )


@pytest.mark.parametrize(
    ("beta", "problem"),
    [
        (-1, "objective.beta: input should be greater than 0 (got -1)"),
        ("high", "objective.beta: input should be a valid number, unable to parse string as a number (got 'high')"),
        (float("nan"), "objective.beta: input should be a finite number (got nan)"),
        ([0.1, -1], "objective.beta.1: input should be greater than 0 (got -1)"),
        (None, "objective.beta: input should be a valid number (got None)"),
        ({"a": 1}, "objective.beta: input should be a valid number (got {'a': 1})"),
        ([], "objective.beta: has 0 values for 4 iterations; give one value or one for each"),
    ],
)
def test_a_value_that_may_be_a_list_has_one_problem_of_its_own_kind(beta, problem):
    assert problems(objective={"beta": beta}) == problem


def test_a_value_where_a_section_belongs_is_told_so():
    assert problems(generation=3) == "generation: must be a section with fields of its own (got 3)"


def test_long_values_are_cut_in_the_error():
    assert len(problems(iterations="x" * 1000)) < 200


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"train": {"learning_rate": [1e-6] * 3}}, "train.learning_rate: has 3 values for 4 iterations"),
        ({"train": {"epochs": [1, 1]}}, "train.epochs: has 2 values for 4 iterations"),
        ({"train": {"lora": {"base": "nf4"}}}, "train.lora.base: nf4 needs train.lora.merge: false"),
        (
            {"train": {"lora": {"base": "int8", "merge": False}, "backend": "deepspeed"}},
            "train.lora.base: int8 needs train.backend: fsdp2",
        ),
        (
            {"train": {"lora": {"merge": False}, "backend": "mine:Backend"}},
            "train.lora.merge: false needs train.backend: fsdp2 or deepspeed",
        ),
        ({"train": {"lora": {"merge": False, "rank": 600}}}, "train.lora.rank: 600 is more than the 512 that vLLM"),
        ({"train": {"optimizer": {"name": "muon"}}}, "train.optimizer.name: muon trains matrices only"),
        (
            {"train": {"lora": {}, "backend": "deepspeed", "optimizer": {"name": "muon"}}},
            "train.optimizer.name: muon needs train.backend: fsdp2",
        ),
        (
            {"train": {"lora": {}}, "sft": {"optimizer": {"name": "muon"}}},
            "sft.optimizer.name: muon trains matrices only",
        ),
        (
            {"train": {"optimizer": {"name": "adamw_8bit"}, "workers": 2}},
            "train.optimizer.name: adamw_8bit needs train.workers: 1",
        ),
        ({"generation": {"sampling": {"max_tokens": 2048}}}, "generation.sampling.max_tokens: 2048 leaves no room"),
        # 2048 + 1024 = 3072
        ({"train": {"pack_length": 3071}}, "train.pack_length: 3071 cannot hold a prompt with both responses"),
        ({"generation": {"resources": {"gpus": 2}}}, "generation.resources.gpus: 2 must equal"),
        ({"generation": {"engine": {"tensor_parallel_size": 2}}}, "generation.engine.tensor_parallel_size: 2 needs"),
        (
            {
                "generation": {
                    "resources": {"gpus": 4},
                    "engine": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
                }
            },
            "gpus: 4 must equal generation.engine.tensor_parallel_size 4 × pipeline_parallel_size 2",
        ),
        ({"generation": {"resources": {"gpus": 0.5}, "engine": {"tensor_parallel_size": 2}}}, "gpus: 0.5 must equal"),
        ({"train": {"resources": {"gpus": 2}}}, "train.resources.gpus: 2; a train worker drives exactly one GPU"),
        ({"train": {"resources": {"gpus": 0.5}}}, "train.resources.gpus: 0.5; a train worker drives exactly one GPU"),
        ({"evaluation": {"answer_extractor": "equals"}}, "evaluation.answer_extractor: needs data.heldout"),
        ({"evaluation": {"samples": 2}}, "evaluation.samples: needs data.heldout"),
        (
            {"data": {"train": "d", "heldout": "h", "heldout_fraction": 0.1}},
            "data.heldout_fraction: holds rows of data.train out, and data.heldout names others; leave one out",
        ),
        (
            {"data": {"train": [{"path": "d"}], "heldout_fraction": 0.1}, "evaluation": {"max_rows": 9}},
            "evaluation.max_rows: data.train is a list of sources; lower data.heldout_fraction in its place",
        ),
        ({"data": {"train": "d", "heldout_fraction": 0}}, "data.heldout_fraction"),
        ({"data": {"train": "d", "heldout_fraction": 0.6}}, "data.heldout_fraction"),
        (
            {"generation": {"samples_per_prompt": 4, "sampling": {"temperature": 0}}},
            "generation.samples_per_prompt: with generation.sampling.temperature 0 all 4 samples are the same; give 1",
        ),
        (
            {
                "data": {"train": "d", "heldout": "h"},
                "evaluation": {"samples": 4},
                "generation": {"sampling": {"top_k": 1}},
            },
            "evaluation.samples: with generation.sampling.top_k 1 all 4 samples are the same; give 1",
        ),
        ({"train": {"lora": {"rank": 4, "target_modules": []}}}, "target_modules: names no layer; give some"),
        (
            {"data": {"train": "d", "heldout": "h"}, "evaluation": {"samples": 2}},
            "evaluation.samples: only grading reads more than one",
        ),
        ({"train": {"backend": "deepspeed", "compile": True}}, "train.compile: is for train.backend: fsdp2"),
        (
            {"train": {"backend": "deepspeed", "reduce_every_pack": False}},
            "train.reduce_every_pack: DeepSpeed sums gradients after each pack",
        ),
        ({"serving": {"replicas": 4, "max_replicas": 2}}, "serving.max_replicas: 2 is fewer than serving.replicas"),
        *(
            ({"scorer": {"kind": "grade", "path": "exact", name: value}}, f"scorer.{name}: is for a preference model")
            for name, value in (("max_length", 9), ("replicas", 2), ("resources", {"cpus": 4}))
        ),
    ],
)
def test_combinations_that_no_run_can_satisfy_are_refused(sections, problem):
    assert problem in problems(**sections)


def test_self_reinforcement_may_read_numbers_without_held_out_rows():
    parse(
        algorithm="self_reinforcement", sft={}, data={"train": "d", "questions": "q"},
        evaluation={"answer_extractor": "hashes"},
    )  # fmt: skip


@pytest.mark.parametrize("window", [0, "some", 1.5, None])
def test_a_window_is_a_count_or_all(window):
    assert problems(objective={"window": window}).startswith("objective.window: input should be")


def test_the_window_of_fictitious_play_reaches_back_to_the_first_iteration():
    assert [parse(objective={"window": window}).objective.oldest_iteration(5) for window in (1, 2, "all")] == [5, 4, 0]


def test_the_smallest_pack_that_holds_prompt_and_both_responses_is_accepted():
    """2048 + 1024."""
    assert parse(train={"pack_length": 3072}).train.pack_length == 3072


def test_addresses_without_a_password_are_taken():
    votes = "postgresql+psycopg://me@host:5432/votes?sslmode=require"
    parse(serving={"votes": votes}, tracking={"mlflow": {"uri": "https://me@host:8443/mlflow"}})
    parse(serving={"votes": "sqlite:////data/votes.sqlite"}, tracking={"mlflow": {"uri": "databricks://profile"}})


def test_settings_given_to_a_run_are_checked():
    assert override(parse(), {"serving.port": "1"}).serving.port == 1
    with pytest.raises(ConfigError, match=r"^the settings given: generation.sampling.temperature: 3: vLLM refuses"):
        override(parse(), {"generation.sampling.temperature": "3"})


@pytest.mark.parametrize(
    "key", ["generation_config", "trust_remote_code", "load_format", "enable_prefix_caching", "dtype", "seed", "model"]
)
def test_engine_arguments_that_exactness_or_trust_depend_on_cannot_be_slipped_in(key):
    found = problems(generation={"engine": {"extra": {key: "auto", "kv_cache_dtype": "auto"}}})
    cure = "use the field of its own" if key == "dtype" else "leave it out"
    assert found == f"generation.engine.extra.{key}: is set by spin_ray; {cure}"


def test_serving_keeps_what_it_does_not_set_itself():
    """Its cache is the user's."""
    free = {"enable_prefix_caching": True}
    assert parse(serving={"engine": {"extra": free}}).serving.engine
    found = problems(serving={"engine": {"extra": free | {"load_format": "pt"}}})
    assert found == "serving.engine.extra.load_format: is set by spin_ray; leave it out"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"workers": 2, "min_workers": 3}, "train.min_workers: 3 is more than the 2 of train.workers"),
        (
            {"workers": 2, "min_workers": 1, "backend": "deepspeed"},
            "a checkpoint of DeepSpeed needs the number of workers that wrote it",
        ),
    ],
)
def test_an_elastic_group_that_cannot_be_is_refused(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpinConfig.model_validate({"model": {"path": "m"}, "data": {"train": "d"}, "train": section})


# What a config is


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_says_what_it_does(section):
    if section not in (Section, IterationSettings):
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_a_config_cannot_be_changed():
    config = parse()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.optimizer.name = "adamw"  # type: ignore[misc]


def test_a_config_survives_the_way_through_run_json():
    config = parse(objective={"beta": [0.1, 0.1, 0.1, 5.0]}, sft={"epochs": 2})
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert SpinConfig.model_validate(stored) == config
    assert SpinConfig.model_validate(stored).identity() == config.identity()


def test_each_iteration_has_its_own_values_where_lists_give_them():
    config = parse(iterations=2, objective={"beta": [0.1, 5.0]}, train={"learning_rate": [5e-7, 1e-7], "epochs": 3})
    assert config.at(0) == IterationSettings(beta=0.1, learning_rate=5e-7, epochs=3)
    assert config.at(1) == IterationSettings(beta=5.0, learning_rate=1e-7, epochs=3)


def test_space_takes_log_ratios_as_they_are_and_fresh_samples():
    """Its theory needs β 1 and y' of the reference; a recipe that says otherwise about β is refused."""
    objective = parse(objective={"loss": "space"}).objective
    assert (objective.beta, objective.window) == (1.0, 1)
    assert parse(objective={"loss": "space", "window": 2}).objective.window == 2
    assert objective.keep_identical and parse(objective={"positive_weight": 5}).objective.keep_identical
    assert not parse(objective={"loss": "space", "keep_identical": False}).objective.keep_identical
    with pytest.raises(ConfigError, match=r"objective.beta: the loss space takes log-ratios as they are; give 1"):
        parse(objective={"loss": "space", "beta": [1.0, 0.1]}, iterations=2)


def test_a_schedule_is_planned_for_no_fewer_epochs_than_are_trained():
    planned = parse(iterations=2, train={"epochs": 2, "schedule_epochs": [6, 2]})
    assert [planned.at(iteration).schedule_epochs for iteration in range(2)] == [6, 2]
    with pytest.raises(ConfigError, match=r"train.schedule_epochs: 1 is less than the 2 of train.epochs"):
        parse(iterations=2, train={"epochs": 2, "schedule_epochs": [6, 1]})


@pytest.mark.parametrize("lacking", ["prompt", "response"])
def test_a_demonstration_without_a_place_is_refused(lacking):
    with pytest.raises(ConfigError, match=rf"sdft.demonstration: lacks \{{{lacking}\}}"):
        parse(algorithm="sdft", sdft={"demonstration": "{prompt}{response}".replace(f"{{{lacking}}}", "")})


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2.9, 2), (16, 16)])
def test_threads_are_the_whole_cpus_and_at_least_one(cpus, threads):
    assert parse(train={"resources": {"cpus": cpus}}).train.resources.threads == threads


def test_a_bundle_names_only_what_is_asked_for():
    custom = {"accelerator_type:H100": 0.001}
    resources = parse(train={"resources": {"cpus": 2, "gpus": 0, "custom": custom}}).train.resources
    assert resources.bundle == {"CPU": 2, "accelerator_type:H100": 0.001}


def test_the_precision_is_left_to_the_machine_unless_it_is_named():
    assert parse().train.precision == "auto"
    assert (
        problems(train={"precision": "int8"})
        == "train.precision: input should be 'auto', 'bf16' or 'fp32' (got 'int8')"
    )


def test_a_recipe_that_names_no_precision_takes_the_one_a_run_began_with():
    named = {name: parse(train={"precision": name}) for name in ("auto", "bf16", "fp32")}
    for name, other in named.items():
        assert named["auto"].settle_precision(other) == other
        assert named["fp32"].settle_precision(other) == named["fp32"], name


@pytest.mark.parametrize(
    ("precision", "dtype", "resolved"),
    [("fp32", "auto", "float32"), ("bf16", "auto", "bfloat16"), ("fp32", "bfloat16", "bfloat16")],
)
def test_the_engine_computes_in_the_precision_of_training_unless_told_otherwise(precision, dtype, resolved):
    """Rounded to fewer bits than it was trained in, θ_t would play like θ_{t-1} after small updates."""
    sections = {"train": {"precision": precision}, "generation": {"engine": {"dtype": dtype}}}
    config = parse_config({"model": {"path": "m"}, "data": {"train": "d"}, **sections}, source="r.yaml")
    assert config.resolve_dtype(config.generation.engine).dtype == resolved


# Sizes of batches


def sizes(config: SpinConfig) -> tuple[int, int]:
    return config.generation.shard_rows, config.generation.engine.max_num_seqs


def test_sizes_that_a_recipe_leaves_open_follow_from_the_device():
    on_gpu = {"resources": {"gpus": 1}}
    assert sizes(config_of().settle_sizes(rows=10**6)) == (512, 256)
    assert sizes(config_of(generation=on_gpu).settle_sizes()) == (4096, 512)
    named = {"shard_rows": 512, "engine": {"max_num_seqs": 256}}
    assert sizes(config_of(generation=on_gpu | named).settle_sizes()) == (512, 256)


def test_settled_sizes_are_ones_that_a_recipe_may_have():
    """vLLM's batch has a token of each response at least; what is settled is read from run.json."""
    engine = {"extra": {"max_num_batched_tokens": 300}}
    settled = config_of(generation={"resources": {"gpus": 1}, "engine": engine}).settle_sizes()
    assert sizes(settled) == (4096, 300)
    assert override(settled, {}) == settled


@pytest.mark.parametrize(
    ("generation", "rows", "expected"),
    [
        ({"replicas": 8}, 50_000, 3125),  # 6250 each: two shards
        ({"replicas": 16}, 50_000, 3125),  # 3125 each: one shard
        ({"replicas": 1}, 1000, 1000),
        ({"replicas": 8, "samples_per_prompt": 5}, 50_000, 3907),  # 31,250 each: eight shards
    ],
)
def test_every_engine_gets_equally_many_shards_of_equal_length(generation, rows, expected):
    config = config_of(generation={"resources": {"gpus": 1}} | generation)
    assert sizes(config.settle_sizes(rows=rows))[0] == expected


def test_a_run_keeps_the_sizes_that_it_began_with():
    """Its recipe may have named them, and its data may have grown; a number in the recipe is not overruled."""
    begun = config_of(generation={"resources": {"gpus": 1}, "shard_rows": 512, "engine": {"max_num_seqs": 256}})
    again = config_of(generation={"resources": {"gpus": 1}}).settle_sizes(begun)
    assert again.identity() == begun.identity()
    other = config_of(generation={"resources": {"gpus": 1}, "shard_rows": 64}).settle_sizes(begun)
    assert sizes(other) == (64, 256)


def test_reported_margins_are_times_beta_but_for_sppo_whose_beta_is_a_step_size():
    sppo = {"algorithm": "sppo", "scorer": {"path": "judge"}, "generation": {"samples_per_prompt": 5}}
    for more, factors in (({}, [0.1, 0.5]), (sppo, [1.0, 1.0])):
        recipe = MINIMAL | {"iterations": 2, "objective": {"beta": [0.1, 0.5]}} | more
        config = parse_config(recipe, source="r.yaml")
        assert [config.margin_beta(iteration) for iteration in (0, 1)] == factors
