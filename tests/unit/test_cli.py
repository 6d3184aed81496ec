"""The command line: one line and exit code 2 for what the user can mend, before anything is written or started."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError, UserError
from spin_ray.inputs.embedded import resolve
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support.made_up_run import made_up_run
from tests.support.paths import RECIPES
from tests.support.tiny_runs import make_run

RECIPE = {
    "model": {"path": "embedded:tiny-llama", "max_length": 128},
    "data": {"train": "embedded:arithmetic-train"},
    "generation": {"sampling": {"max_tokens": 24}},
}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.getLogger("httpx").level
    yield
    logging.getLogger("httpx").setLevel(level)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def assert_one_line(found: tuple[int, str, str], message: str) -> None:
    code, out, error = found
    assert code == 2
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert out == ""


# Bad input


def test_a_typo_in_a_recipe_is_one_line_and_exit_code_2_in_a_real_process(tmp_path, recipe):
    recipe.write_text(yaml.safe_dump(RECIPE | {"train": {"learning_rat": 1e-6}, "iterations": 0}))
    command = [sys.executable, "-m", "spin_ray", "run", str(recipe), "--out", str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert_one_line(
        (found.returncode, found.stdout, found.stderr),
        f"{recipe}: iterations: input should be greater than or equal to 1 (got 0); train.learning_rat: unknown key",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_terminal_without_the_signs_of_the_tables_gets_others(tmp_path):
    run = made_up_run(tmp_path / "run")
    command = [sys.executable, "-m", "spin_ray", "status", str(run.storage.root)]
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, env=ascii_alone, capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert "log p(y?)" in found.stdout


def slow_imports(*arguments: object) -> list[str]:
    """Returns the libraries that take seconds to load and that a command has loaded."""
    code = (
        "import json, sys\n"
        "from spin_ray.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as error: assert error.code != 1\n"
        "finally: print('\\n' + json.dumps(sorted({'torch', 'ray', 'transformers', 'vllm'} & sys.modules.keys())))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_a_typo_in_a_recipe_is_told_without_loading_torch_or_ray(recipe):
    recipe.write_text(yaml.safe_dump(RECIPE | {"iterations": 0}))
    assert slow_imports("run", recipe, "--out", "never") == []


@pytest.mark.slow
def test_a_finished_run_is_told_without_loading_torch_or_ray(tmp_path, recipe):
    run = make_run(tmp_path / "run", iterates=4)
    recipe.write_text(json.dumps(run.config().model_dump(mode="json")))
    nothing_to_log = "--tracking.tensorboard=false"  # a run that was trained has its files
    assert slow_imports("run", recipe, "--out", run.storage.root, nothing_to_log) == []


@pytest.mark.slow
def test_a_plan_loads_neither_transformers_nor_ray():
    lengths = ("--rows=1000", "--prompt-tokens=100", "--response-tokens=100")
    assert slow_imports("plan", RECIPES / "zephyr_7b.yaml", *lengths) in ([], ["torch"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "none.jsonl"}}, "none.jsonl: no such data"),
        ({"data": {"train": "embedded:none"}}, "names no embedded asset"),
        ({"model": {"path": "none", "max_length": 128}}, "model.path none: no such folder"),
        ({"model": {"path": "embedded:tiny-llama", "max_length": 600}}, "600 is more than the 512 positions"),
        (
            {"generation": RECIPE["generation"] | {"engine": {"extra": {"zzz": 1}}}},
            "generation.engine.extra.zzz: vLLM has no such argument",
        ),
        ({"objective": {"beta": [1.0]}}, "objective.beta: has 1 values for 4 iterations"),
    ],
)
@pytest.mark.parametrize("command", ["run", "doctor"])
def test_what_cannot_be_used_is_one_line_and_no_run_is_begun(call, tmp_path, recipe, command, changes, message):
    recipe.write_text(yaml.safe_dump(RECIPE | changes))
    found = call(command, recipe, "--out", tmp_path / "run")
    if command == "doctor" and "beta" not in message:  # it says what is right before what is wrong
        assert found[1].startswith("ok recipe")
        found = (found[0], "", found[2])
    assert_one_line(found, message)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_recipe_that_is_not_there_is_one_line(call, tmp_path):
    assert_one_line(call("run", tmp_path / "none.yaml", "--out", tmp_path / "run"), "none.yaml: there is no such file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.learning_rat=1e-6"], "train.learning_rat: unknown key"),
        (["--train.learning_rate=[1,"], "--train.learning_rate=[1,: is not YAML"),
        (["--train.learning_rate", "1e-6"], "--train.learning_rate: unknown argument"),
        (["train.learning_rate=1e-6"], "train.learning_rate=1e-6: unknown argument"),
        (["--=1"], "--=1: unknown argument"),
        (["-q"], "-q: unknown argument"),
        (["--iterations=0"], "iterations: input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(call, tmp_path, recipe, words, message):
    assert_one_line(call("run", recipe, "--out", tmp_path / "run", *words), message)


@pytest.mark.parametrize("words", [["run"], ["run", "r.yaml"], ["nonsense"], ["status"]])
def test_a_wrong_call_shows_the_usage_and_is_exit_code_2(call, words):
    code, _, error = call(*words)
    assert code == 2
    assert "Usage: " in error


# Help


def test_the_list_of_commands_cuts_no_summary(call):
    code, out, _ = call("--help")
    assert code == 0 and "…" not in out and "..." not in out.partition("Commands:")[2]


@pytest.mark.parametrize("command", ["init", "run", "plan", "doctor", "probe", "serve", "compare"])
def test_a_command_that_takes_overrides_says_what_they_are(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and "[OVERRIDES]..." in out and "  OVERRIDES " in out


# Nothing is written over


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the visible files: those that a person would miss."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_a_folder_that_holds_something_else_is_left_as_it_was(call, tmp_path, recipe):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    assert_one_line(call("run", recipe, "--out", folder), "is not a run and not empty (holds thesis.tex)")
    assert files_of(folder) == {"thesis.tex": b"years of work"}


def test_a_file_in_place_of_the_folder_is_left_as_it_was(call, tmp_path, recipe):
    path = tmp_path / "notes"
    path.write_text("mine")
    assert_one_line(call("run", recipe, "--out", path), "notes: cannot hold a run")
    assert path.read_text() == "mine"


def test_another_run_is_left_as_it_was(call, tmp_path, recipe):
    run = RunDir(Storage(tmp_path / "run"))
    from spin_ray.config.load import load_config
    from spin_ray.inputs.check import check_recipe

    config = load_config(recipe)
    run.begin(config, check_recipe(config).facts())
    run.storage.create("iter_000/generations/part-00000.parquet", b"")
    before = files_of(run.storage.root)
    assert_one_line(
        call("run", recipe, "--out", run.storage.root, "--seed=1"), "holds another run: seed (was 0, now 1)"
    )
    assert files_of(run.storage.root) == before


# Good input


def test_completion_of_a_shell_asks_the_program(call, monkeypatch):
    code, out, _ = call("completion", "zsh")
    assert code == 0 and "_SPIN_RAY_COMPLETE=zsh_complete spin-ray" in out
    monkeypatch.setenv("_SPIN_RAY_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", "spin-ray doc")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = call()
    assert code == 0 and out.splitlines()[:2] == ["plain", "doctor"]


@pytest.fixture
def started(monkeypatch):
    """Calls of run_spin, recorded in place of runs."""
    from spin_ray.loop import launch
    from spin_ray.report import status as summary

    found: list[Any] = []
    result = launch.RunResult(run=None, model=Path("m"), evaluations=[])  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "run_spin", lambda config, out: found.append((config, out)) or result)
    monkeypatch.setattr(summary, "print_summary", lambda run, console: None)
    return found


def test_overrides_change_the_recipe_and_the_rest_stays(call, started, recipe):
    words = ["--train.learning_rate=5e-7", "--objective.beta=[0.1, 5.0]", "--iterations=2", "--data.system=be brief"]
    assert call("run", recipe, "--out", "RUN", *words) == (0, "", "")
    ((config, out),) = started
    assert (config.train.learning_rate, config.objective.beta, config.iterations) == (5e-7, (0.1, 5.0), 2)
    assert (config.data.system, config.data.train, out) == ("be brief", "embedded:arithmetic-train", "RUN")


@pytest.mark.parametrize("value", ["a=b", "--x=1", "no: colon"])
def test_a_value_may_hold_what_separates_values_elsewhere(call, started, recipe, value):
    code, _, error = call("run", recipe, "--out", "RUN", f"--data.system='{value}'")
    assert (code, error) == (0, "")
    assert started[0][0].data.system == value


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("mend this"), 2, "error: mend this\n"),
        (StageError("try again"), 1, "error: try again\n"),
        (KeyboardInterrupt(), 1, "\nstopped; the same command goes on from what is committed\n"),
    ],
)
def test_exit_codes_tell_what_can_be_mended_from_what_failed(call, monkeypatch, recipe, error, code, text):
    from spin_ray.loop import launch

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(launch, "run_spin", fail)
    assert call("run", recipe, "--out", "RUN") == (code, "", text.format(recipe=recipe))


def test_a_bug_is_not_hidden_behind_one_line(call, monkeypatch, recipe):
    from spin_ray.loop import launch

    monkeypatch.setattr(launch, "run_spin", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("run", recipe, "--out", "RUN")


def test_status_shows_a_run_and_refuses_what_is_none(call, tmp_path):
    run = RunDir(Storage(tmp_path / "run"))
    facts = {"inputs": {}, "start_model": resolve("embedded:tiny-llama"), "versions": {}}
    run.begin(SpinConfig.model_validate(RECIPE), facts)
    run.publish(0)
    code, out, error = call("status", tmp_path / "run")
    assert (code, error) == (0, "")
    assert "LATEST: sft" in out
    assert_one_line(call("status", tmp_path / "none"), "none: is not a run (no run.json)")


def test_doctor_says_what_is_right_and_asks_the_cluster(call, monkeypatch, tmp_path, recipe):
    from spin_ray.loop import doctor
    from spin_ray.runtime import placement

    monkeypatch.setattr(doctor, "connect", lambda config: None)
    monkeypatch.setattr(placement, "node_resources", lambda labels=None: [{"CPU": 1.0}])
    code, out, _ = call("doctor", recipe, "--out", tmp_path / "run")
    assert code == 0
    for line in ("ok recipe", "ok data", "ok model", "GiB free", "ok generation: 1 ×", "ok train: 1 ×", "ray 2."):
        assert line in out
    monkeypatch.setattr(placement, "usable_cpus", lambda: 1)
    found = call("doctor", recipe, "--train.workers=2")
    assert_one_line((found[0], "", found[2]), "train asks for 2 × 1 CPU")
    assert "warning train asks for 2 CPUs, and this process may use 1" in found[1] and "generation asks" not in found[1]
    assert not (tmp_path / "run").exists()


def test_doctor_can_end_where_no_machine_of_the_run_is(call, monkeypatch, tmp_path, recipe):
    """On the login node of a cluster: GPUs and vLLM are on its nodes."""
    from spin_ray.loop import doctor

    monkeypatch.setattr(doctor, "connect", lambda config: pytest.fail("Ray was started"))
    words = ("--train.workers=2", "--train.resources.gpus=1", "--generation.resources.gpus=1", "--no-cluster")
    code, out, error = call("doctor", recipe, "--out", tmp_path / "run", *words)
    assert (code, error) == (0, "")
    assert "ok model" in out and "not checked train: 2 × {'CPU': 1" in out


def test_doctor_asks_the_autoscaler_for_the_nodes_that_it_waits_for_and_gives_them_back(call, monkeypatch, recipe):
    from spin_ray.loop import doctor
    from spin_ray.runtime import autoscaler, placement

    asked: list[list[Any]] = []
    nodes = [{"CPU": 1.0}]
    monkeypatch.setattr(doctor, "connect", lambda config: None)
    monkeypatch.setattr(placement, "node_resources", lambda labels=None: nodes)
    monkeypatch.setattr(autoscaler, "send", asked.append)
    monkeypatch.setattr(placement.time, "sleep", lambda _: nodes.append({"CPU": 1.0}))
    code, out, _ = call("doctor", recipe, "--train.workers=2", "--cluster.wait_for_nodes_s=60")
    assert code == 0 and "ok train: 2 ×" in out
    assert asked[0] and asked[-1] == []


def test_doctor_as_json_is_one_object(call, monkeypatch, recipe):
    from spin_ray.loop import doctor
    from spin_ray.runtime import placement

    monkeypatch.setattr(doctor, "connect", lambda config: None)
    monkeypatch.setattr(placement, "node_resources", lambda labels=None: [{"CPU": 1.0}])
    code, out, _ = call("doctor", recipe, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["data"][0]["usable"] > 0
    assert found["data"][0]["example"]["real_ids"][-1] == found["end_of_turn_id"]
    assert found["precision"]["chosen"] in ("bf16", "fp32")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "x"}', "rows cannot be used (1 malformed)"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "rows cannot be used (1 empty)"),
    ],
)
def test_doctor_refuses_data_without_a_usable_row(call, tmp_path, recipe, row, words):
    data = tmp_path / "rows.jsonl"
    data.write_text(row + "\n")
    found = call("doctor", recipe, f"--data.train={data}")
    assert_one_line((found[0], "", found[2]), words)
