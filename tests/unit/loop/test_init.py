"""``spin-ray init``: a look at model, data and hardware becomes a recipe that loads and fits."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from spin_ray.__main__ import cli
from spin_ray.config.load import load_config, parse_config
from spin_ray.errors import ConfigError
from spin_ray.inputs.survey import Survey
from spin_ray.loop.algorithms.table import check_algorithm, check_settings, find_algorithm
from spin_ray.loop.init import look
from spin_ray.loop.init.command import Options, _answers
from spin_ray.loop.init.command import init as write_recipe
from spin_ray.loop.init.fit import _ladder, fit
from spin_ray.loop.init.foreign_config import read_foreign
from spin_ray.loop.init.look import Look, find_machines, heldout_beside
from spin_ray.loop.init.settings import Setting, Settings, tree_of
from spin_ray.loop.init.text import recipe_text
from spin_ray.planning.model_shape import MISTRAL_7B
from spin_ray.planning.plan import Given, predict
from spin_ray.planning.remedies import _changes
from spin_ray.planning.work import Work
from spin_ray.runtime.gpu_memory import Card

HERE = ("--model", "embedded:tiny-llama", "--data", "embedded:arithmetic-train", "--yes")
GIVEN = {"model.path": Setting("m"), "data.train": Setting("rows.jsonl")}


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["init", *map(str, arguments)])


@pytest.fixture
def seen(monkeypatch) -> Callable[..., Look]:
    """Makes up data of ``rows`` rows of ``whole`` tokens, and a model."""

    def look_at(rows: int, whole: int, response: int, **known: Any) -> Look:
        work = Work(rows=rows, prompt=whole - response, real=response, generated=response)
        monkeypatch.setattr("spin_ray.loop.init.fit.read_work", lambda config, given: work)
        found = Survey("rows.jsonl", 2048, ["rows.jsonl"], [], True, rows, rows, Counter(messages=rows))
        found.lengths, found.responses = [whole] * rows, [response] * rows
        return Look(train=(found,), rows=rows, **known)

    return look_at


def fitted(given: Settings, found: Look, gpu: str, gpus: int = 1) -> tuple[dict[str, object], str]:
    settings, _, misfit = fit(given, found, find_machines(gpu, gpus, 1))
    check_settings(parse_config(tree_of(settings), source="init"))
    return {place: setting.value for place, setting in settings.items()}, misfit


@pytest.mark.slow
def test_a_recipe_of_this_machine_s_model_and_data_is_written_and_read(tmp_path):
    recipe = tmp_path / "mine.yaml"
    result = init(recipe, *HERE, "--heldout", "embedded:arithmetic-heldout", "--gpu", "none", "--sft")
    assert result.exit_code == 0, result.output
    config = load_config(recipe)
    check_algorithm(config)
    assert config.model.max_length == 64 and config.generation.sampling.max_tokens == 32  # the rows have 26 to 32, 12
    assert config.train.global_batch_pairs == 32 and config.sft is not None  # 512 rows, at least 10 steps
    assert config.data.heldout == "embedded:arithmetic-heldout"
    assert "form messages, 512 of 512 rows usable" in result.output
    assert f"spin-ray run {recipe} --out runs/mine" in result.output
    assert "exists" in str(init(recipe, *HERE).exception), "a recipe is never written over"


def test_columns_that_are_not_read_are_listed(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n} + 1", "context": "c", "response": "{n + 1}"}}\n' for n in range(40)))
    result = init(tmp_path / "mine.yaml", "--model", "embedded:tiny-llama", "--data", rows, "--gpu", "none")
    assert result.exit_code == 0, result.output
    assert "not read: context (40 rows)" in result.output


def test_rows_are_those_that_a_mixture_gives_and_an_array_has_many_whatever_its_name(tmp_path):
    """Of 40 and 40 rows, 5 beside 10 by the weights 2 and 1 of which the second has 5."""
    for name, count in (("a", 40), ("b", 40), ("c", 5)):
        rows = [{"prompt": f"{name} {number}", "response": "r"} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(rows))
    measures = {"a": {"rows": 5}, "b": {"weight": 2}, "c": {"weight": 1}}
    train = [{"path": str(tmp_path / f"{name}.jsonl")} | measure for name, measure in measures.items()]
    settings = {"model.path": Setting("embedded:tiny-llama"), "data.train": Setting(train)}
    assert look.look(settings).rows == 5 + 10 + 5
    settings["data.train"] = Setting(str(tmp_path / "a.jsonl"))
    assert look.look(settings).rows == 40


def test_a_foreign_config_becomes_a_recipe_and_says_once_what_is_not_carried_over(tmp_path):
    source, recipe = tmp_path / "sft.yaml", tmp_path / "mine.yaml"
    said = {"model_name_or_path": "embedded:tiny-llama", "dataset_name": "x/y", "max_length": 128, "logging_steps": 5}
    source.write_text(yaml.safe_dump(said | {"output_dir": str(tmp_path / "out")}))
    result = init(recipe, "--from", source, "--data", "embedded:arithmetic-train", "--gpu", "none", "--yes")
    assert result.exit_code == 0, result.output
    config = load_config(recipe)
    assert config.model.max_length == 128 and config.sft is not None and config.sft.learning_rate == 2e-5
    assert result.output.count("logging_steps") == 1 and "#   logging_steps: has no equal here" in recipe.read_text()
    assert f"--out {tmp_path / 'out'}-spin" in result.output


def test_spin_starts_from_what_a_foreign_sft_has_made(tmp_path):
    """output_dir is a model: no second warm-up."""
    from spin_ray.inputs.embedded import resolve

    source, recipe = tmp_path / "sft.yaml", tmp_path / "mine.yaml"
    made = resolve("embedded:tiny-llama")
    source.write_text(yaml.safe_dump({"base_model": "org/base", "learning_rate": 1e-5, "output_dir": made}))
    result = init(recipe, "--from", source, "--data", "embedded:arithmetic-train", "--gpu", "none", "--yes")
    assert result.exit_code == 0, result.output
    config = load_config(recipe)
    assert config.model.path == made and config.sft is None


@pytest.mark.parametrize(("missing", "words"), [("--model", "model.path"), ("--data", "data.train")])
def test_without_a_terminal_what_is_missing_is_named(tmp_path, missing, words):
    at = HERE.index(missing)
    result = init(tmp_path / "mine.yaml", *HERE[:at], *HERE[at + 2 :], "--gpu", "none")
    assert (
        isinstance(result.exception, ConfigError) and str(result.exception) == f"{words}: is not given; add {missing}"
    )


def test_a_person_is_asked_for_what_is_not_given_and_enter_takes_what_was_found(tmp_path):
    """Hardware, model, rows, held-out rows, warm-up; what was typed as an option is not asked for."""
    asked: list[tuple[str, str | None]] = []

    def ask(question: str, default: str | None) -> str:
        asked.append((question.partition(" ")[0], default))
        answers = {"GPU": "L4", "GPUs": "2", "Training": "embedded:arithmetic-train", "Is": "no"}
        return answers.get(asked[-1][0], default or "")

    recipe = tmp_path / "mine.yaml"
    write_recipe(Options(recipe=recipe, model="embedded:tiny-llama"), ask, Console(quiet=True))
    config = load_config(recipe)
    assert [question for question, _ in asked] == ["GPU", "GPUs", "Training", "Held-out", "Is"]
    assert config.train.workers == 2 and config.sft is not None and config.data.heldout is None
    with pytest.raises(ConfigError, match="many is no number"):
        write_recipe(Options(recipe=tmp_path / "no.yaml"), lambda *_: "many", Console(quiet=True))


def test_values_given_to_init_are_in_the_recipe(tmp_path):
    """Columns of another name are read under the given ones; the recipe's name may come later, sections be whole."""
    rows, recipe = tmp_path / "rows.csv", tmp_path / "mine.yaml"
    rows.write_text("query,solution\n" + "".join(f"what is {n}?,it is {n}\n" for n in range(40)))
    words = ["--model", "embedded:tiny-llama", "--data", rows, "--gpu", "none", "--yes"]
    assert "data.columns" in str(init(recipe, *words).exception)
    columns, lengths = "--data.columns={prompt: query, response: solution}", "--generation={sampling: {max_tokens: 48}}"
    result = init(
        columns, *words, "--model.max_length=80", recipe, lengths, "--train.pack_length=200", "--train.lora={}"
    )
    assert result.exit_code == 0, result.output
    config = load_config(recipe)
    assert config.data.columns == {"prompt": "query", "response": "solution"} and config.train.lora is not None
    assert (config.model.max_length, config.generation.sampling.max_tokens, config.train.pack_length) == (80, 48, 200)
    assert "pack_length: 200" in recipe.read_text() and "# given" in recipe.read_text()
    whole = init(tmp_path / "b.yaml", f"--data.train={HERE[3]}", f"--model.path={HERE[1]}", "--gpu=none", "--yes")
    assert whole.exit_code == 0, whole.output


def test_what_is_given_stays_where_a_card_is_too_small_for_it(seen):
    """Of 7B on 24 GB the packs would be cut and adapters taken."""
    large = seen(50_000, 1000, 500, shape=MISTRAL_7B, positions=32768)
    kept = {"train.pack_length": Setting(6000), "model.max_length": Setting(4096), "train.lora": Setting(None)}
    for given in (kept, {place: kept[place] for place in list(kept)[:2]}):
        settings, _, misfit = fit(GIVEN | given, large, find_machines("RTX 4090", 1, 1), given)
        assert settings == settings | given
        assert ("train.lora.rank" in settings) == ("train.lora" not in given), misfit


def test_data_given_twice_is_a_list_and_paths_with_brackets_are_shown(tmp_path):
    """Rows and held-out rows; ``evaluation.max_rows`` is for one source alone."""
    for name in "abcd":
        (tmp_path / f"{name}[red].jsonl").write_text(
            "".join(f'{{"prompt": "{name} {n}", "response": "{n}"}}\n' for n in range(40))
        )
    a, b, c, d = (str(tmp_path / f"{name}[red].jsonl") for name in "abcd")
    recipe = tmp_path / "r[bold].yaml"
    words = ("--data", a, "--data", b, "--heldout", c, "--heldout", d)
    result = init(recipe, "--model", "embedded:tiny-llama", *words, "--gpu", "none", "--yes")
    assert result.exit_code == 0, result.output
    config = load_config(recipe)
    assert [source.path for source in config.data.train] == [a, b]
    assert [source.path for source in config.data.heldout] == [c, d] and config.evaluation.max_rows is None
    assert f"data {a}: form" in result.output and f"ok {recipe}\n" in result.output


def test_what_is_given_in_place_of_a_foreign_config_s_own_takes_what_belonged_to_it_along(tmp_path):
    """A base model below another model, and names of columns of other rows, would stop the run."""
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "a.json", "columns": {"prompt": "q"}}}')
    said = {"model_name_or_path": "org/base", "stage": "sft", "adapter_name_or_path": "saves/sft", "dataset": "a"}
    source, recipe = tmp_path / "sft.yaml", tmp_path / "mine.yaml"
    source.write_text(yaml.safe_dump(said | {"max_samples": 9}))
    result = init(recipe, "--from", source, *HERE, "--data", HERE[3], "--gpu", "none")
    assert result.exit_code == 0, result.output
    config = load_config(recipe)
    assert config.model.base is None and config.data.columns == {} and config.data.max_rows is None
    assert "model.base" in result.output and "data.columns" in result.output


def test_spin_starts_from_the_whole_model_that_a_foreign_sft_made_from_an_adapter(tmp_path):
    """No base is named for it. An adapter above another adapter is no start, as one adapter is merged."""
    made = tmp_path / "out"
    said = {"model_name_or_path": "org/base", "stage": "sft", "adapter_name_or_path": "saves/a"}
    source = tmp_path / "sft.yaml"
    source.write_text(yaml.safe_dump(said | {"output_dir": str(made), "create_new_adapter": True}))
    options = Options(recipe=tmp_path / "r.yaml", source=source, data=("embedded:arithmetic-train",))
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    above = _answers(options, read_foreign(source, 1), None)
    assert above["model.path"].value == "saves/a" and above["model.base"].value == "org/base"
    (made / "adapter_config.json").rename(made / "config.json")
    whole = _answers(options, read_foreign(source, 1), None)
    assert whole["model.path"].value == str(made) and "model.base" not in whole


def test_a_model_that_is_not_here_is_said_to_be_unseen(tmp_path):
    recipe = tmp_path / "mine.yaml"
    result = init(recipe, "--model", "org/model", "--data", "rows.jsonl", "--gpu", "A100-80G", "--yes")
    assert "org/model is not on this machine" in result.output and load_config(recipe).generation.resources.gpus == 1
    assert "By arithmetic" not in result.output, "hours of rows that nobody has seen would be made up"
    assert "spin-ray plan" not in result.output, "it would refuse a model whose sizes it does not know"
    known = init(tmp_path / "known.yaml", "--model", "mistralai/Mistral-7B-v0.1", *HERE[2:], "--gpu", "A100-80G")
    assert f"Hours: spin-ray plan {tmp_path / 'known.yaml'} --nodes 1 --gpu A100-80G" in known.output


def test_a_recipe_for_several_machines_is_started_on_a_cluster(tmp_path):
    """Ray of this machine alone would refuse its workers."""
    recipe = tmp_path / "mine.yaml"
    here = ("--model", "mistralai/Mistral-7B-v0.1", *HERE[2:], "--gpus-per-node", "4")
    said = init(recipe, *here, "--gpu", "A100-80G", "--nodes", "2").output
    start = f"{recipe} --out runs/mine\n"
    assert f"spin-ray doctor {recipe} --no-cluster\n" in said and "spin-ray run" not in said
    assert f"Slurm: sbatch --nodes=2 --gpus-per-node=4 jobs/slurm/spin.sbatch {start}" in said
    assert f"ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/run_spin.py {start}" in said
    said = init(tmp_path / "one.yaml", *here, "--gpu", "A100-80G").output
    assert f"spin-ray doctor {tmp_path / 'one.yaml'}\n" in said and "sbatch" not in said


def test_seven_billion_weights_are_trained_whole_on_eight_large_cards_and_by_adapters_on_a_small_one(seen):
    look = seen(50_000, 400, 250, shape=MISTRAL_7B, positions=32768)
    large, misfit = fitted(GIVEN, look, "A100-80G", 8)
    assert not misfit and (large["train.workers"], large["generation.replicas"]) == (8, 8)
    assert "train.lora.rank" not in large and "train.offload" not in large
    small, misfit = fitted(GIVEN, look, "RTX-4090")
    assert not misfit and small["train.lora.rank"] == 16
    assert small["train.learning_rate"] == pytest.approx(5e-6)
    rate = {"train.learning_rate": Setting(2e-6, "mine")}
    assert fitted(GIVEN | rate, look, "RTX-4090")[0]["train.learning_rate"] == pytest.approx(2e-5)


def test_a_dpo_config_of_long_rows_becomes_a_recipe(tmp_path):
    """The pack length is init's own choice, so init may not refuse it: 2 × 4,096 - 1 tokens for two responses."""
    (tmp_path / "trl.yaml").write_text("model_name_or_path: o/m\ndataset_name: o/d\nbeta: 0.1\nmax_length: 4096\n")
    where = ("--from", tmp_path / "trl.yaml", "--gpu", "H100-80G", "--gpus-per-node", "8", "--yes")
    result = init(tmp_path / "mine.yaml", *where)
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "mine.yaml")
    assert config.algorithm == "dpo" and config.train.pack_length == 8191


@pytest.mark.parametrize(("algorithm", "least"), [("spin", 3072), ("dpo", 4095), ("tspin", 4096)])
@pytest.mark.parametrize("gpu", ["RTX-4090", "A100-80G", "none"])
def test_packs_of_every_rung_hold_what_the_algorithm_needs(seen, algorithm, least, gpu):
    given = GIVEN | {"model.max_length": Setting(2048), "algorithm": Setting(algorithm), "iterations": Setting(2)}
    look = seen(50_000, 2000, 1020, shape=MISTRAL_7B, positions=32768)
    machines = find_machines(gpu, 1, 1)
    base, _, _ = fit(given, look, machines)
    for rung in _ladder(base, machines, MISTRAL_7B):
        config = parse_config(tree_of(base | rung), source="init")
        check_settings(config)
        assert least <= config.train.pack_length <= 4096


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"), [(32, 8, {1, 2, 4, 8}), (28, 4, {1, 2, 4}), (40, 10, {1, 2}), (9, 3, {1})]
)
def test_engines_of_every_rung_have_sizes_that_vllm_takes(seen, heads, kv_heads, sizes):
    machines = find_machines("A100-80G", 8, 1)
    base, _, _ = fit(GIVEN, seen(50_000, 2000, 1020, shape=MISTRAL_7B), machines)
    shape = replace(MISTRAL_7B, heads=heads, kv_heads=kv_heads)
    rungs = [parse_config(tree_of(base | rung), source="init") for rung in _ladder(base, machines, shape)]
    assert {config.generation.engine.tensor_parallel_size for config in rungs} == sizes


@pytest.mark.parametrize(("algorithm", "least"), [("spin", 5120), ("dpo", 8191)])
def test_a_shorter_pack_that_would_fit_is_one_that_the_algorithm_takes(algorithm, least):
    recipe = GIVEN | {
        "algorithm": Setting(algorithm), "model.max_length": Setting(4096), "train.pack_length": Setting(65536),
        "train.resources.gpus": Setting(1), "generation.resources.gpus": Setting(1), "train.workers": Setting(8),
    }  # fmt: skip
    config = parse_config(tree_of(recipe), source="test")
    tried = [*_changes(config, MISTRAL_7B, "training", find_algorithm(algorithm).least_pack(config))]
    assert min(each["train.pack_length"] for each in tried if "train.pack_length" in each) == least


def test_weights_of_four_bits_come_before_weights_in_the_cpu_s_memory(seen):
    """Llama 3 8B: 16 GB in bf16 and a step of 1,536 tokens are too much for 24 GB."""
    large = seen(50_000, 1000, 500, shape=replace(MISTRAL_7B, vocab=128256), positions=8192)
    settings, misfit = fitted(GIVEN, large, "RTX 4090")
    assert not misfit and "train.offload" not in settings
    assert (settings["train.lora.base"], settings["train.lora.merge"]) == ("nf4", False)


def test_an_engine_over_several_cards_stays_on_one_node(seen):
    """Six cards a node hold one engine of four, so two nodes hold two."""
    wide = replace(MISTRAL_7B, layers=500)
    settings, _, _ = fit(GIVEN, seen(50_000, 400, 250, shape=wide), find_machines("A100-80G", 6, 2))
    assert settings["generation.engine.tensor_parallel_size"].value == 4
    assert settings["generation.replicas"].value == 2


@pytest.mark.parametrize(
    ("kind", "plan", "unknown"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX-4090", False),
        ("NVIDIA RTX A5000", "L4", True),
        ("NVIDIA GeForce RTX 3090", "RTX-3090", False),
    ],
)
def test_the_cards_of_this_machine_are_seen_though_its_torch_knows_none(monkeypatch, kind, plan, unknown):
    card = Card(name=f"GPU 0 ({kind})", kind=kind, total=24 * 2**30, free=0)
    monkeypatch.setattr(look, "visible_cards", lambda: [card, card])
    monkeypatch.setattr(look, "cpu_builds", lambda: {"torch": "torch 2.13.0+cpu"})
    machines = find_machines(None, None, 1)
    assert (machines.cluster.gpu, machines.gpus) == (plan, 2)
    assert machines.note.endswith("computes on CPUs alone; run the recipe in that of `make gpu-setup`")
    assert (f"{kind} is not among the plan's cards; settings are for" in machines.note) == unknown
    monkeypatch.setattr(look, "visible_cards", list)
    assert find_machines(None, None, 1).gpus == 0 and not find_machines(None, None, 1).note
    monkeypatch.setattr(look, "_torch_sees_a_card", lambda: True)
    assert "its driver does not tell which" in find_machines(None, None, 1).note


def test_adapters_of_a_foreign_sft_get_a_learning_rate_of_adapters(seen):
    given = GIVEN | {"train.lora.rank": Setting(8)}
    assert fitted(given, seen(900, 100, 30), "none")[0]["train.learning_rate"] == pytest.approx(5e-6)


def test_lengths_hold_the_rows_within_the_model_s_positions(seen):
    """The 99th percentile of 1000 tokens, rounded up, but never more than the model takes."""
    assert fitted(GIVEN, seen(900, 1000, 300), "none")[0]["model.max_length"] == 1024
    bounded = fitted(GIVEN, seen(900, 1000, 300, positions=512), "none")[0]
    assert (bounded["model.max_length"], bounded["generation.sampling.max_tokens"]) == (512, 320)
    given = GIVEN | {"model.max_length": Setting(2048, "of theirs")}
    assert fitted(given, seen(900, 1000, 300, positions=512), "none")[0]["model.max_length"] == 512


def test_the_hours_of_init_are_those_of_plan(tmp_path):
    """A mixture's lengths count by its rows, too long rows are left out, and 2 % of 1,000 are 20 held-out rows."""
    for name, count, words in (("a", 1000, 1), ("b", 100, 40)):
        rows = ({"prompt": f"{name} {n}", "response": "word " * (400 if n % 50 == 49 else words)} for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}]
    one = Setting(str(tmp_path / "a.jsonl"))
    limit = {"model.max_length": Setting(256)}
    for given in ({"data.train": Setting(train)}, {"data.train": one, "data.heldout_fraction": Setting(0.02)}):
        settings = {"model.path": Setting("embedded:tiny-llama")} | given | limit
        machines = find_machines("none", None, 1)
        fitted, phases, _ = fit(settings, look.look(settings), machines)
        config = parse_config(tree_of(fitted), source="init")
        plan = predict(config, machines.cluster, Given(), find_algorithm(config.algorithm))
        assert phases == plan.phases


def test_what_fits_nowhere_is_said(seen):
    _, misfit = fitted(GIVEN, seen(900, 1000, 300, shape=MISTRAL_7B), "none")
    assert "does not fit" in misfit


def test_rows_beside_the_training_rows_are_held_out(tmp_path):
    (tmp_path / "my_test.jsonl").touch()
    assert heldout_beside(str(tmp_path / "my_train.jsonl")) == str(tmp_path / "my_test.jsonl")
    assert heldout_beside(str(tmp_path / "rows.jsonl")) is None


def test_values_that_yaml_could_misread_come_back(tmp_path):
    settings = {
        "model.path": Setting("/a: b #c"), "data.train": Setting([{"path": "yes"}, {"path": "1e3"}]),
        "train.learning_rate": Setting(5e-7, "why"), "seed": Setting(3),
    }  # fmt: skip
    assert yaml.safe_load(recipe_text(settings, ["a head"])) == tree_of(settings)
