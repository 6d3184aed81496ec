"""What an ended attempt at a training leaves behind is used, or said, or removed."""

import json
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import RunDirError
from spin_ray.loop.stages.training import stage as training
from spin_ray.loop.stages.training import worker
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.snapshot import SNAPSHOT
from tests.support import small_run
from tests.support.small_run import committed


def with_train(config: SpinConfig, **changes: Any) -> SpinConfig:
    train = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    return SpinConfig.model_validate(train.model_dump())


def cut_down_in_step(monkeypatch: pytest.MonkeyPatch, config: SpinConfig, out: Path, number: int) -> None:
    """Runs until step ``number`` begins; a checkpoint is made after the second of four steps."""
    steps, take = [], worker.train_step

    def step(*given: Any) -> Any:
        if len(steps) == number:
            raise KeyboardInterrupt
        steps.append(given)
        return take(*given)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            small_run.run(config, out)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, r"learning_rate \(was 0.001, now 0.002\)"),
        ({"epochs": 3}, r"epochs \(was 2, now 3\)"),
        ({"schedule_epochs": 3}, r"schedule_epochs \(was None, now 3\)"),
        ({"optimizer": OptimizerConfig(eps=1e-3)}, r"optimizer\.eps \(was None, now 0.001\)"),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_a_half_trained_iteration_is_not_begun_anew_with_other_settings_without_a_word(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    """The settings may change between two calls, but not within an iteration. Restored, the run goes on."""
    out = tmp_path / "run"
    cut_down_in_step(monkeypatch, config, out, 3)
    with pytest.raises(
        RunDirError,
        match=rf"other values of {named} is not finished; restore them, or remove iter_000/checkpoints to train from",
    ):
        small_run.run(with_train(config, **changes), out)
    log = RunDir(Storage(out))
    assert [line["step"] for line in read_json_lines(log.storage, "iter_000/train_log.jsonl")] == [0, 1, 2]
    small_run.run(config, out)
    assert committed(out) == committed(calm)


def test_before_its_first_checkpoint_an_iteration_begins_with_any_settings(
    tmp_path: Path, config: SpinConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does one whose pairs are others, as they were removed and made again."""
    out = tmp_path / "run"
    cut_down_in_step(monkeypatch, config, out, 1)
    other = with_train(config, learning_rate=2e-3)
    cut_down_in_step(monkeypatch, other, out, 3)
    (seal,) = out.glob("iter_000/checkpoints/*/*/spin_ray-0.json")
    content = json.loads(seal.read_text())
    content["identity"]["rows"] = "of other pairs"
    seal.write_text(json.dumps(content))
    small_run.run(config, out)
    assert (out / "iter_000/model").exists()


def test_a_run_whose_snapshot_ray_had_cut_goes_on_from_its_checkpoint(
    tmp_path: Path,
    config: SpinConfig,
    calm: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``tests/unit/loop/test_checkpoint.py`` shows that Ray reads what is made in its place."""
    out = tmp_path / "run"
    cut_down_in_step(monkeypatch, config, out, 3)
    (folder,) = (out / "iter_000/checkpoints").iterdir()
    (folder / SNAPSHOT).touch()
    small_run.run(config, out)
    assert f"{folder / SNAPSHOT}: is damaged; made again from checkpoint, step 2" in caplog.text
    assert committed(out) == committed(calm)


@pytest.mark.parametrize("keeps", [False, True])
def test_checkpoints_that_a_driver_left_beside_a_committed_model_go_unless_they_are_kept(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """It was killed after its workers had committed the model."""
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"keep_checkpoints": keeps})})
    work = training.run_workers

    def killed_after_it(*given: Any, **named: Any) -> None:
        work(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_workers", killed_after_it)
        with pytest.raises(KeyboardInterrupt):
            small_run.run(config, tmp_path / "run")
    assert list((tmp_path / "run/iter_000/checkpoints").rglob("*.distcp"))
    small_run.run(config, tmp_path / "run")
    assert (tmp_path / "run/iter_000/checkpoints").exists() == keeps
    assert committed(tmp_path / "run") == committed(calm)
