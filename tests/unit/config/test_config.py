"""The recipe: every problem in one error, overrides, lists per iteration, and what makes two runs the same run."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from spin_ray.config import recipe as recipe_module
from spin_ray.config import sections as sections_module
from spin_ray.config.load import load_config, parse_config
from spin_ray.config.recipe import IterationSettings, SpinConfig, digest, flatten
from spin_ray.config.sections import Section
from spin_ray.errors import ConfigError

MINIMAL = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}
SECTIONS = sorted(
    {
        value
        for module in (sections_module, recipe_module)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    },
    key=lambda section: section.__name__,
)
PLAIN = {**MINIMAL, "train": {"learning_rate": 1e-6}}


def parse(**sections: Any) -> SpinConfig:
    return parse_config(MINIMAL | sections, source="r.yaml")


def problems(**sections: Any) -> str:
    """What the one line says after the name of the recipe."""
    with pytest.raises(ConfigError) as caught:
        parse(**sections)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix("r.yaml: ")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return path


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
        "evaluation.answer_extractr: unknown key; cluster.adress: unknown key; "
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
    assert problems(model=big, train={"pack_lenght": 10_000}) == "train.pack_lenght: unknown key"


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
        ({"generation": {"sampling": {"max_tokens": 2048}}}, "generation.sampling.max_tokens: 2048 leaves no room"),
        # 2048 + 1024 = 3072
        ({"train": {"pack_length": 3071}}, "train.pack_length: 3071 cannot hold a prompt with both responses"),
        ({"generation": {"resources": {"gpus": 2}}}, "generation.resources.gpus: 2 must equal"),
        ({"generation": {"engine": {"tensor_parallel_size": 2}}}, "generation.engine.tensor_parallel_size: 2 needs"),
        ({"train": {"resources": {"gpus": 2}}}, "train.resources.gpus: 2; a train worker drives exactly one GPU"),
        ({"train": {"resources": {"gpus": 0.5}}}, "train.resources.gpus: 0.5; a train worker drives exactly one GPU"),
        ({"evaluation": {"answer_extractor": "equals"}}, "evaluation.answer_extractor: needs data.heldout"),
    ],
)
def test_combinations_that_no_run_can_satisfy_are_refused(sections, problem):
    assert problem in problems(**sections)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"algorithm": "sppo", "generation": {"samples_per_prompt": 5}}, "scorer: algorithm sppo needs it"),
        (
            {"algorithm": "sppo", "scorer": {"path": "judge"}},
            "generation.samples_per_prompt: sppo compares samples of a prompt",
        ),
        ({"algorithm": "self_reinforcement", "sft": {}}, "data.questions: algorithm self_reinforcement needs it"),
        ({"algorithm": "seft"}, "reviser: algorithm seft needs it"),
        ({"reviser": {}}, "reviser: is for algorithm seft, not for spin"),
        ({"data": {"train": "d", "questions": "q"}}, "data.questions: is for algorithm self_reinforcement and seft"),
        ({"algorithm": "dpo", "objective": {"window": "all"}}, "objective.window: is for algorithm spin"),
        ({"algorithm": "dpo", "objective": {"reference_alpha": 0.5}}, "objective.reference_alpha: is for algorithm"),
    ],
)
def test_settings_that_an_algorithm_lacks_or_does_not_read_are_refused(sections, problem):
    assert problem in problems(**sections)


def test_sppo_has_a_loss_of_its_own():
    found = problems(
        algorithm="sppo", scorer={"path": "m"}, generation={"samples_per_prompt": 5}, objective={"loss": "hinge"}
    )
    assert found == "objective.loss: sppo has a loss of its own; leave it out"


NAMED = [
    ("algorithm", "'spin', 'continued_sft', 'dpo', 'sppo', 'self_reinforcement' or 'seft'"),
    ("objective.loss", "'logistic', 'hinge', 'exponential' or 'correlation'"),
    ("train.backend", "'fsdp2' or 'deepspeed'"),
    ("train.optimizer.name", "'rmsprop' or 'adamw'"),
]


@pytest.mark.parametrize(("key", "names"), NAMED)
def test_an_unknown_name_is_told_the_known_ones(recipe, key, names):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, {key: "best"})
    assert str(caught.value) == f"{recipe}: {key}: input should be {names} (got 'best')"


@pytest.mark.parametrize("key", [key for key, _ in NAMED])
@pytest.mark.parametrize("path", ["mine:Mine", "my_pkg.mine:Mine", "_a.b2.c:_d"])
def test_an_import_path_stands_for_something_of_the_users_own(recipe, key, path):
    config = load_config(recipe, {key: path})
    assert flatten(config.model_dump(mode="json"))[key] == path
    assert config.identity()[key] == path


@pytest.mark.parametrize("key", [key for key, _ in NAMED])
@pytest.mark.parametrize("path", ["my pkg:Mine", "mine:", ":Mine", "a..b:C", "a:b:c", "a/b.py:C", "1a:B", "a:B\n"])
def test_an_import_path_of_the_wrong_form_is_told_the_right_one(recipe, key, path):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, {key: json.dumps(path)})
    reason = "must be an import path module:Name, e.g. my_package.mine:Name"
    assert str(caught.value) == f"{recipe}: {key}: {reason} (got {path!r})"


def test_an_algorithm_of_the_users_own_may_read_any_setting():
    """What it needs is known to its class alone."""
    sections = {"scorer": {"path": "s"}, "reviser": {}, "objective": {"window": "all", "reference_alpha": 0.5}}
    assert parse(algorithm="mine:Mine", **sections).algorithm == "mine:Mine"


@pytest.mark.parametrize("window", [0, "some", 1.5, None])
def test_a_window_is_a_count_or_all(window):
    assert problems(objective={"window": window}).startswith("objective.window: input should be")


def test_the_window_of_fictitious_play_reaches_back_to_the_first_iteration():
    assert [parse(objective={"window": window}).objective.oldest_iteration(5) for window in (1, 2, "all")] == [5, 4, 0]


def test_the_smallest_pack_that_holds_prompt_and_both_responses_is_accepted():
    """2048 + 1024."""
    assert parse(train={"pack_length": 3072}).train.pack_length == 3072


def test_engines_may_share_a_gpu():
    assert parse(generation={"resources": {"gpus": 0.5}}).generation.resources.bundle == {"CPU": 1, "GPU": 0.5}


@pytest.mark.parametrize(
    "key", ["generation_config", "trust_remote_code", "load_format", "enable_prefix_caching", "dtype", "seed", "model"]
)
def test_engine_arguments_that_exactness_or_trust_depend_on_cannot_be_slipped_in(key):
    found = problems(generation={"engine": {"extra": {key: "auto", "kv_cache_dtype": "auto"}}})
    assert found == f"generation.engine.extra.{key}: is set by spin_ray; use the field of its own"


# Files and overrides


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "must hold sections (model, data, …), found list"),
        ("", "must hold sections (model, data, …), found NoneType"),
        ("seed: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("[" * 350, "is not YAML"),
        ("a: !!bool maybe", "is not YAML"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_one_line(tmp_path, content, reason):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}: {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_not_text_is_one_line(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("none.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "5e-7", 5e-7),  # YAML 1.1 reads this as text; a number is meant
        ("train.learning_rate", "[5e-7, 5e-7, 1e-7, 1e-7]", (5e-7, 5e-7, 1e-7, 1e-7)),
        ("objective.beta", "[0.1, 0.1, 0.1, 5.0]", (0.1, 0.1, 0.1, 5.0)),
        ("generation.sampling.max_tokens", "7", 7),
        ("model.path", "other", "other"),
        ("sft.epochs", "3", 3),
        ("evaluation.max_rows", "null", None),
        ("iterations", "9", 9),
    ],
)
def test_overrides_are_yaml_values_at_dotted_places(recipe, key, text, value):
    found: Any = load_config(recipe, {key: text})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_leaves_the_other_values_of_its_section(recipe):
    config = load_config(recipe, {"train.epochs": "1"})
    assert (config.train.epochs, config.train.learning_rate) == (1, 1e-6)


def test_an_override_may_name_a_section_that_the_recipe_left_empty(recipe):
    recipe.write_text(yaml.safe_dump(MINIMAL) + "sft:\n")
    assert load_config(recipe, {"sft.epochs": "2"}).sft.epochs == 2


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("train.learning_rat", "1", "train.learning_rat: unknown key"),
        ("model.path.x", "1", "--model.path.x: path is a value, not a section"),
        ("train.epochs", "[1", "--train.epochs=[1: is not YAML"),
        ("seed", "2024-13-45", "--seed=2024-13-45: is not YAML"),
        ("seed", "-1", "seed: input should be greater than or equal to 0"),
        ("train..epochs", "1", "unknown key"),
    ],
)
def test_a_bad_override_is_named(recipe, key, text, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, {key: text})
    assert reason in str(caught.value)


# What a config is


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_says_what_it_does(section):
    if section not in (Section, IterationSettings):
        assert [name for name, field in section.model_fields.items() if not field.description and name != "name"] == []


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


@pytest.mark.parametrize(
    "sections",
    [
        {"cluster": {"address": "auto", "local_cpus": 4, "wait_for_nodes_s": 60}},
        {"storage": {"lease_timeout_s": 10, "keep_checkpoints": True}},
        {"generation": {"replicas": 8, "start_timeout_s": 5, "shard_timeout_s": 5}},
        {"generation": {"resources": {"custom": {"fast": 1}}}},
        {"generation": {"engine": {"gpu_memory_utilization": 0.5, "cpu_kv_cache_gib": 8}}},
        {"train": {"max_failures": 9, "checkpoint_every_steps": 1, "start_timeout_s": 5}},
        {"train": {"resources": {"custom": {"fast": 1}}}},
        {"iterations": 9},
        {"iterations": 5, "objective": {"beta": [1.0, 1.0, 1.0, 1.0, 2.0]}},
    ],
)
def test_identity_ignores_where_and_how_fast_it_runs_and_what_may_grow(sections):
    assert parse(**sections).identity() == parse().identity()


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"seed": 1}, {"seed"}),
        ({"data": {"train": "other.jsonl"}}, {"data.train"}),
        ({"generation": {"sampling": {"top_p": 0.9}}}, {"generation.sampling.top_p"}),
        ({"generation": {"shard_rows": 8}}, {"generation.shard_rows"}),
        ({"generation": {"engine": {"dtype": "float32"}}}, {"generation.engine.dtype"}),
        ({"objective": {"loss": "hinge"}}, {"objective.loss"}),
        ({"objective": {"window": "all"}}, {"objective.window"}),
        ({"objective": {"reference_alpha": 0.5}}, {"objective.reference_alpha"}),
        ({"objective": {"length_normalised": True}}, {"objective.length_normalised"}),
        ({"algorithm": "dpo"}, {"algorithm"}),
        ({"train": {"optimizer": {"name": "adamw"}}}, {"train.optimizer.name"}),
        ({"train": {"workers": 2}}, {"train.workers"}),
    ],
)
def test_identity_holds_what_decides_the_result(sections, keys):
    one, other = parse().identity(), parse(**sections).identity()
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == keys


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2.9, 2), (16, 16)])
def test_threads_are_the_whole_cpus_and_at_least_one(cpus, threads):
    assert parse(train={"resources": {"cpus": cpus}}).train.resources.threads == threads


def test_a_bundle_names_only_what_is_asked_for():
    custom = {"accelerator_type:H100": 0.001}
    resources = parse(train={"resources": {"cpus": 2, "gpus": 0, "custom": custom}}).train.resources
    assert resources.bundle == {"CPU": 2, "accelerator_type:H100": 0.001}


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1, "b": [1, 2]}) != digest({"a": 1, "b": [2, 1]})


def test_flatten_keeps_empty_sections():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}}) == {"a.b.c": 1, "a.d": {}}


# Anything at all

names = [name for section in SECTIONS for name in section.model_fields]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["auto", "5e-7", "linear", "embedded:x", 0, 1, -1, 2**70])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(names) | st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def config_or_error(content: dict[str, Any]) -> SpinConfig | str:
    try:
        return parse_config(content, source="fuzz")
    except ConfigError as error:
        return str(error)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SpinConfig.model_fields)) | st.text(max_size=3), values, max_size=6))
def test_any_mapping_is_a_config_or_a_config_error(content):
    for recipe in (content, MINIMAL | content):
        found = config_or_error(recipe)
        assert isinstance(found, SpinConfig) or found.removeprefix("fuzz: ")


def leaves(section: type[Section] = SpinConfig, prefix: str = "") -> list[str]:
    """Dotted names of every setting."""
    found = []
    for name, field in section.model_fields.items():
        inner = next(
            (kind for kind in SECTIONS if kind in (field.annotation, *getattr(field.annotation, "__args__", ()))), None
        )
        found += leaves(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(leaves()), scalars | st.lists(scalars, max_size=4), min_size=1, max_size=3))
def test_any_value_of_a_setting_is_accepted_or_its_setting_is_named(changes):
    content: dict[str, Any] = {}
    for key, value in (flatten(MINIMAL) | changes).items():
        *sections, field = key.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    found = config_or_error(content)
    named = {part for key in changes for part in (key.split(".")[0], key.split(".")[-1])}
    assert isinstance(found, SpinConfig) or any(part in found for part in named)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abk0159-_:.[]{}&*!?|>'\"%@#, \n\t=~", max_size=40) | st.text(max_size=20))
def test_any_override_is_a_config_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    for key in ("seed", "generation.engine.extra", text):
        try:
            load_config(path, {key: text})
        except ConfigError:
            continue


@pytest.mark.parametrize(
    ("precision", "gpus", "resolved"),
    [("auto", 1, "bf16"), ("auto", 0, "fp32"), ("bf16", 0, "bf16"), ("fp32", 1, "fp32")],
)
def test_a_precision_that_nobody_named_or_measured_is_bf16_on_gpus_and_fp32_on_cpus(precision, gpus, resolved):
    assert parse(train={"precision": precision, "resources": {"gpus": gpus}}).precision == resolved


@pytest.mark.parametrize(
    ("precision", "gpus", "on_cpu", "resolved"),
    [
        ("auto", 0, "bf16", "bf16"),
        ("auto", 0, "fp32", "fp32"),
        ("auto", 1, "fp32", "bf16"),
        ("bf16", 0, "fp32", "bf16"),
        ("fp32", 0, "bf16", "fp32"),
    ],
)
def test_auto_becomes_what_is_faster_on_cpus_and_bf16_on_gpus(precision, gpus, on_cpu, resolved):
    config = parse(train={"precision": precision, "resources": {"gpus": gpus}, "epochs": 3})
    found = config.resolve_precision(on_cpu)
    assert (found.train.precision, found.precision) == (resolved, resolved)
    assert found == parse(train={"precision": resolved, "resources": {"gpus": gpus}, "epochs": 3})


def test_a_recipe_that_names_no_precision_takes_the_one_a_run_began_with():
    named = {name: parse(train={"precision": name}) for name in ("auto", "bf16", "fp32")}
    for name, other in named.items():
        assert named["auto"].take_precision_of(other) == other
        assert named["fp32"].take_precision_of(other) == named["fp32"], name


@pytest.mark.parametrize(
    ("precision", "dtype", "resolved"),
    [
        ("fp32", "auto", "float32"),
        ("bf16", "auto", "bfloat16"),
        ("fp32", "bfloat16", "bfloat16"),
        ("auto", "auto", "float32"),
    ],
)
def test_the_engine_computes_in_the_precision_of_training_unless_told_otherwise(precision, dtype, resolved):
    """Rounded to fewer bits than it was trained in, θ_t would play like θ_{t-1} after small updates."""
    sections = {"train": {"precision": precision}, "generation": {"engine": {"dtype": dtype}}}
    config = parse_config({"model": {"path": "m"}, "data": {"train": "d"}, **sections}, source="r.yaml")
    assert config.resolve_dtype(config.generation.engine).dtype == resolved


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
