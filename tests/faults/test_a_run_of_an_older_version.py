"""A run that an older version left half-way is finished by this one.

The archive holds inputs and run folder of ``small_run`` as commit 9052209 left them, the last one before the modules
moved into rooms. It was killed in the fourth of four steps: a checkpoint after the second, no model yet.
"""

import json
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from spin_ray.config.load import parse_config
from spin_ray.loop.stages.training import worker
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.paths import ROOT

ARCHIVE = ROOT / "tests" / "support" / "data" / "halfway_run_of_9052209.tar.gz"
MADE_AT = "/tmp/old_run"


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    """The folder with ``inputs`` and ``run``; run.json names the inputs where they are now."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    description = tmp_path / "run" / "run.json"
    description.write_text(description.read_text().replace(MADE_AT, str(tmp_path)))
    return tmp_path


def test_a_run_that_was_killed_in_training_goes_on_at_its_checkpoint(halfway: Path, monkeypatch) -> None:
    before = {path: path.read_bytes() for path in (halfway / "run").rglob("part-*.parquet")}
    stored = json.loads((halfway / "run" / "run.json").read_text())
    config = parse_config(stored["config"], source="run.json")
    steps = []
    take_step = worker.train_step
    monkeypatch.setattr(worker, "train_step", lambda *given: steps.append(1) or take_step(*given))
    small_run.run(config, halfway / "run")

    run = RunDir(Storage(halfway / "run"))
    assert run.latest() == "iter_000"
    assert len(steps) == 2, "the checkpoint was made after two of four steps"
    assert [line["step"] for line in read_json_lines(run.storage, "iter_000/train_log.jsonl")] == [0, 1, 2, 3]
    assert {path: path.read_bytes() for path in before} == before, "what was committed stays as it was"

    small_run.run(config, halfway / "anew")
    finished, anew = (load_file(halfway / name / "iter_000/model/model.safetensors") for name in ("run", "anew"))
    assert_close(finished, anew, rtol=1e-3, atol=1e-6)


def test_events_of_an_older_version_are_read(halfway: Path) -> None:
    """They have no folder and no kind of their own; the stage says both."""
    events = RunDir(Storage(halfway / "run")).events()
    stages = {(event["folder"], event["kind"]) for event in events if event["event"] == "commit"}
    assert {("sft", "heldout_samples"), ("iter_000", "pairs")} <= stages
