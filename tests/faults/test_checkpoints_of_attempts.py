"""What an ended attempt at a training leaves behind is used, or said, or removed."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import RunDirError, StageError
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.loop.stages.training import checkpoint, worker
from spin_ray.loop.stages.training import stage as training
from spin_ray.planning.disk import parameters_of
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import ATTEMPTS, Disk, Storage
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


class DiskOfModels(Disk):
    """A disk on which something happens as the model is to get its name."""

    def __init__(self, happens: Callable[[Path, Path], None]) -> None:
        self._happens = happens

    def rename_folder(self, source: Path, target: Path) -> None:
        if target.name == "model":
            self._happens(source, target)
        super().rename_folder(source, target)


def is_full(*_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def was_faster(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def was_there(_: Path, target: Path) -> None:
    target.mkdir()
    (target / "foreign").touch()


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    steps, take = [], worker.train_step
    monkeypatch.setattr(worker, "train_step", lambda *given: steps.append(given) or take(*given))
    return steps


@pytest.mark.parametrize(("unsaved_s", "again"), [(-1.0, 0), (600.0, 2)], ids=["long", "short"])
def test_an_export_to_a_full_disk_leaves_nothing_and_is_made_again_without_long_steps(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch, unsaved_s: float, again: int
) -> None:
    """Steps since the last checkpoint, after the second of four, are saved before the export if they took long."""
    out, steps = tmp_path / "run", counted_steps(monkeypatch)
    monkeypatch.setattr(worker, "UNSAVED_S", unsaved_s)
    with pytest.raises(StageError, match=r"model: could not be written \(No space left on device\); see to that"):
        small_run.run(config, out, DiskOfModels(is_full))
    assert len(steps) == 4
    assert list((out / ATTEMPTS).iterdir()) == []
    small_run.run(config, out)
    assert len(steps) == 4 + again
    assert committed(out) == committed(calm)
    logged = read_json_lines(Storage(out), "iter_000/train_log.jsonl")
    assert [line["step"] for line in logged] == [0, 1, 2, 3]


def test_steps_are_not_saved_before_the_export_where_the_model_would_lose_its_room(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 thousand parameters in fp32, of RMSProp: a checkpoint of 8 bytes each and a model of 4."""
    saved, save = [], checkpoint.save
    monkeypatch.setattr(worker, "UNSAVED_S", -1.0)
    monkeypatch.setattr(checkpoint, "save", lambda job, backend, step: saved.append(step) or save(job, backend, step))
    parameters = parameters_of(Path(config.model.path))
    for room, steps in ((12 * parameters, [2]), (12 * parameters + 1, [2, 4])):
        saved.clear()
        monkeypatch.setattr(worker, "free_bytes", lambda _, room=room: float(room))
        small_run.run(config, tmp_path / str(room))
        assert saved == steps
        assert committed(tmp_path / str(room)) == committed(calm)


def with_little_room(write: Callable[[Fsdp2Backend, Path], None]) -> Callable[[Fsdp2Backend, Path], None]:
    def limited(backend: Fsdp2Backend, folder: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        try:
            write(backend, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def is_full_for_a_folder(*_: object) -> None:
    raise shutil.Error([("a", "b", f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'b'")])


@pytest.mark.parametrize("place", ["within", "after"])
def test_a_checkpoint_that_cannot_be_written_is_said_as_any_other(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The disk is full as torch writes the files, or as Ray Train keeps them."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if place == "within":
            patch.setattr(Fsdp2Backend, "save", with_little_room(Fsdp2Backend.save))
        else:
            patch.setattr(shutil, "copytree", is_full_for_a_folder)
        with pytest.raises(StageError, match=r"iter_000/checkpoints: could not be written \(.*\); see to that and run"):
            small_run.run(config, out)
    assert list((out / ATTEMPTS).iterdir()) == []
    small_run.run(config, out)
    assert committed(out) == committed(calm)


def test_an_error_of_a_checkpoint_that_is_not_the_disks_stays_as_it_is(
    tmp_path: Path, config: SpinConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("another error")

    monkeypatch.setattr(Fsdp2Backend, "save", broken)
    with pytest.raises(RuntimeError, match="another error"):
        small_run.run(config, tmp_path / "run")


def test_a_file_of_the_export_that_cannot_be_written_is_said_as_any_other(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of 8 KiB a file stands for a disk that is full in the middle of the weights."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Fsdp2Backend, "export_hf", with_little_room(Fsdp2Backend.export_hf))
        with pytest.raises(StageError, match=r"iter_000/model: could not be written \(.*File too large.*\); see to"):
            small_run.run(config, out)
    assert list((out / ATTEMPTS).iterdir()) == []
    small_run.run(config, out)
    assert committed(out) == committed(calm)


def test_workers_that_start_again_beside_a_committed_model_compute_nothing(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One died after the commit, before Ray Train heard that all were done. The commit's event counts the steps."""
    out, steps, work = tmp_path / "run", counted_steps(monkeypatch), training.run_workers

    def again(*given: Any, **named: Any) -> Any:
        work(*given, **named)
        monkeypatch.setattr(worker, "make_backend", None)
        return work(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_workers", again)
        small_run.run(config, out)
    assert len(steps) == 4
    assert committed(out) == committed(calm)
    (event,) = [
        event
        for event in RunDir(Storage(out)).events()
        if (event["event"], event["stage"]) == ("commit", "iter_000/training")
    ]
    assert event["steps"] == 4


def test_a_model_that_other_workers_committed_meanwhile_is_the_result(
    tmp_path: Path, config: SpinConfig, calm: Path
) -> None:
    """As those of a controller that was thought dead. Another model at that place stays an error."""
    small_run.run(config, tmp_path / "run", DiskOfModels(was_faster))
    assert committed(tmp_path / "run") == committed(calm)
    with pytest.raises(StageError, match=r"model: could not be written \(.*is there already\)"):
        small_run.run(config, tmp_path / "other", DiskOfModels(was_there))


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
