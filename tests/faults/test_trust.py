"""Code and pickles that come with a model never run; secrets of a recipe are never written down."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_ray import __main__ as cli
from tests.support.paths import ROOT


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def with_code(model: Path, canary: Path) -> None:
    (model / "modeling_mine.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass M: pass\n")


def with_auto_map(model: Path, canary: Path) -> None:
    with_code(model.parent, canary)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_mine.M"}}))


def with_tokenizer_map(model: Path, canary: Path) -> None:
    with_code(model.parent, canary)
    path = model / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["modeling_mine.M", None]}})
    )


def with_pickle(model: Path, canary: Path) -> None:
    torch.save({"weight": _Canary(canary)}, model / "pytorch_model.bin")


def with_pickle_only(model: Path, canary: Path) -> None:
    with_pickle(model, canary)
    (model / "model.safetensors").unlink()


@pytest.fixture
def model(tmp_path: Path, config: Any) -> Path:
    import shutil

    return Path(shutil.copytree(config.model.path, tmp_path / "model"))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["spin-ray", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("poison", [with_code, with_auto_map, with_tokenizer_map, with_pickle, with_pickle_only])
def test_a_model_with_code_or_pickles_is_refused_and_its_code_never_runs(
    tmp_path: Path, config: Any, model: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[[Path, Path], None]
) -> None:
    canary = tmp_path / "canary"
    poison(model, canary)
    recipe = tmp_path / "recipe.yaml"
    content = config.model_dump(mode="json") | {"model": config.model.model_dump() | {"path": str(model)}}
    recipe.write_text(json.dumps(content))
    assert call(monkeypatch, "run", str(recipe), "--out", str(tmp_path / "run")) == cli.EXIT_BAD_INPUT
    assert not canary.exists()


def test_the_canary_sings_when_its_file_is_opened(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    pickle.loads(pickle.dumps(_Canary(tmp_path / "canary")))  # noqa: S301 (our own, to see it run)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train": "s3://AKIA:hunter2@bucket/rows.jsonl"}},
        {"data": {"train": "s3://bucket/rows.jsonl?region=x&secret_key=hunter2"}},
        {"model": {"path": "https://me:hunter2@hub/model"}},
        {"generation": {"engine": {"extra": {"hf_token": "hunter2"}}}},
        {"serving": {"engine": {"extra": {"hf_token": "hunter2"}}}},
        {"serving": {"votes": "postgresql+psycopg://me:hun/hunter2@host/votes"}},
        {"serving": {"votes": "mysql://host/votes?user=me&passwd=hunter2"}},
        {"tracking": {"mlflow": {"uri": "https://me:hunter2@host"}}},
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"path": "m"}, "data": {"train": "d.jsonl"}} | changes))
    out = tmp_path / "run"
    assert call(monkeypatch, "run", str(recipe), "--out", str(out)) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr()
    assert "environment" in printed.err or "$HF_TOKEN" in printed.err
    assert "hunter2" not in printed.err + printed.out and not out.exists()


def test_no_secret_of_the_environment_reaches_the_run_folder_or_the_log(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.support import small_run

    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    small_run.run(config, tmp_path / "run")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert not written and "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle\n\npickle.load(open('f', 'rb'))", "S301"),
        ("import pickle\n\npickle.loads(b'')", "S301"),
        ("import marshal\n\nmarshal.loads(b'')", "S302"),
        ("import torch\n\ntorch.load('f')", "TID251"),
        ("from torch import load\n\nload('f')", "TID251"),
        ("import yaml\n\nyaml.load('f', yaml.Loader)", "S506"),
        ("eval('1')", "S307"),
    ],
)
def test_lint_refuses_what_runs_the_content_of_a_file(line: str, rule: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--output-format=concise",
        "--stdin-filename=spin_ray/new.py",
        "-",
    ]
    found = subprocess.run(command, input=line + "\n", cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and f" {rule} " in found.stdout


def test_only_what_ray_carries_between_processes_is_let_through() -> None:
    let_through = {
        (path.relative_to(ROOT).as_posix(), reason)
        for path in (ROOT / "spin_ray").rglob("*.py")
        for reason in re.findall(r"# noqa: (?:S301|S302|TID251) ?(.*)", path.read_text())
    }
    why = "(from this run's driver, through Ray)"
    files = ("loop/stages/generation/stage.py", "loop/stages/prompts/slices.py", "runtime/workers.py")
    assert let_through == {(f"spin_ray/{file}", why) for file in files}
