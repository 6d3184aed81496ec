"""Checkpoints in a run folder: how they come there, what of them is checked, and Ray Train's list of them."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.train
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from spin_ray.errors import RunDirError
from spin_ray.loop.stages.training import checkpoint
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.object_storage import ObjectStorage
from spin_ray.run_dir.storage import Storage
from tests.support.learner_cases import one_rank
from tests.support.ranks import run_ranks


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    with one_rank(tmp_path):
        yield


@pytest.mark.parametrize("is_local", [True, False], ids=["file_system", "store"])
def test_the_files_of_all_ranks_come_into_one_folder(tmp_path: Path, monkeypatch, is_local: bool) -> None:
    (tmp_path / "run").mkdir()
    store = None if is_local else SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    storage = StorageContext(str(tmp_path / "run") if is_local else "run", "work", storage_filesystem=store)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    numbers = {}
    for rank in range(2):
        source = tmp_path / f"attempt-{rank}"
        (source / "optimizer").mkdir(parents=True)
        (source / f"optimizer/{rank}").write_text(f"of rank {rank}")
        numbers[rank] = (source / f"optimizer/{rank}").stat().st_ino
        kept = checkpoint._into_place(ray.train.Checkpoint.from_directory(source), "checkpoint_0")
        assert kept.filesystem == storage.storage_filesystem
    found = tmp_path / "run/work/checkpoint_0/optimizer"
    assert {path.name: path.read_text() for path in found.iterdir()} == {"0": "of rank 0", "1": "of rank 1"}
    assert ({rank: (found / str(rank)).stat().st_ino for rank in range(2)} == numbers) == is_local


def test_a_checkpoint_is_on_the_disk_before_ray_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is synced before it gets its name, and each folder once it has all names."""
    (tmp_path / "run").mkdir()
    storage = StorageContext(str(tmp_path / "run"), "work")
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    source = tmp_path / "attempt"
    (source / "optimizer").mkdir(parents=True)
    for name in ("optimizer/0", "spin_ray-0.json"):
        (source / name).write_text(name)
    synced, sync = [], os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)
        synced.append((str(path), sum(each.is_file() for each in source.rglob("*"))))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    checkpoint._into_place(ray.train.Checkpoint.from_directory(source), "checkpoint_0")
    files, folders = synced[:2], synced[2:]
    assert sorted(path for path, _ in files) == ["attempt/optimizer/0", "attempt/spin_ray-0.json"]
    assert [left for _, left in files] == [2, 1]
    assert folders == [(f"run/work{name}", 0) for name in ("/checkpoint_0/optimizer", "/checkpoint_0", "")]


class Kept:
    """A folder of Ray Train with its real list of checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.context = StorageContext(str(folder), "work")
        self.snapshot = Path(self.context.checkpoint_manager_snapshot_path)

    def report(self, name: str, step: int) -> Path:
        """Adds a sealed checkpoint, as ``checkpoint.save`` does."""
        folder = Path(self.context.build_checkpoint_path_from_name(name))
        folder.mkdir()
        (folder / "__0_0.distcp").write_text(f"weights after step {step}")
        checkpoint.seal(folder, step, {"learning_rate": 0.1})
        made = ray.train.Checkpoint(str(folder), self.context.storage_filesystem)
        report = _TrainingReport(checkpoint=made, metrics={"step": step}, validation=False)
        asyncio.run(self._register(report))
        return folder

    async def _register(self, report: _TrainingReport) -> None:
        self._manager().register_checkpoint(report)

    def _manager(self) -> CheckpointManager:
        return CheckpointManager(ray.train.CheckpointConfig(num_to_keep=2), self.context)

    def latest(self) -> str | None:
        """Returns the checkpoint from which Ray Train's next workers begin."""

        async def read() -> Any:
            return self._manager().latest_checkpoint_result

        newest = asyncio.run(read())
        return newest and Path(newest.checkpoint.path).name


@pytest.mark.parametrize("damage", ["empty", "half", "of a folder that is gone"])
def test_a_cut_snapshot_is_made_again_from_the_newest_whole_checkpoint(
    tmp_path: Path, process_group: None, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Three checkpoints lie there: the newest is damaged, too. Ray reads what is made, and adds to it."""
    kept, storage = Kept(tmp_path), Storage(tmp_path)
    checkpoint.mend_snapshot(storage, "work")
    assert kept.latest() is None, "nothing was there yet"
    kept.report("checkpoint_1", 9)
    kept.report("checkpoint_2", 10)
    whole = kept.snapshot.read_bytes()
    checkpoint.mend_snapshot(storage, "work")
    assert kept.snapshot.read_bytes() == whole
    (kept.report("checkpoint_3", 11) / "__0_0.distcp").write_text("weights cut")
    if damage == "of a folder that is gone":
        kept.snapshot.write_bytes(kept.snapshot.read_bytes().replace(b"checkpoint_3", b"checkpoint_4"))
    else:
        kept.snapshot.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
    with pytest.raises(CheckpointManagerInitializationError):
        kept.latest()
    checkpoint.mend_snapshot(storage, "work")
    assert kept.latest() == "checkpoint_2"
    assert "is damaged; made again from checkpoint_2, step 10" in caplog.text
    kept.report("checkpoint_5", 12)
    assert kept.latest() == "checkpoint_5"


def test_a_cut_snapshot_without_a_whole_checkpoint_goes(tmp_path: Path, process_group: None) -> None:
    kept = Kept(tmp_path)
    (kept.report("checkpoint_1", 9) / "spin_ray-0.json").unlink()
    kept.snapshot.write_bytes(b"")
    checkpoint.mend_snapshot(Storage(tmp_path), "work")
    assert kept.latest() is None


def test_a_checkpoint_on_a_store_is_read_from_this_machines_cache(
    tmp_path: Path, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's temporary folder is often a small disk, or memory."""
    context = SimpleNamespace(get_local_rank=lambda: 0, get_local_world_size=lambda: 1, get_node_rank=lambda: 0)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/__0_0.distcp").write_text("weights")
    checkpoint.seal(tmp_path / "saved", 7, {})
    newest = ray.train.Checkpoint("saved", SubTreeFileSystem(str(tmp_path), LocalFileSystem()))
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: newest)
    monkeypatch.setattr(object_storage, "CACHE", tmp_path / "cache")
    job: Any = SimpleNamespace(
        identity=dict, checkpoints="iter_000/checkpoints", elastic=False, storage=ObjectStorage("s3://bucket/run")
    )
    loaded: list[Path] = []

    def load(folder: Path) -> None:
        assert (folder / "__0_0.distcp").read_text() == "weights"
        loaded.append(folder)

    elsewhere = tempfile.gettempdir()
    assert checkpoint.restore(job, cast(Any, SimpleNamespace(load=load))) == 7
    assert loaded[0].is_relative_to(tmp_path / "cache")
    assert not loaded[0].exists()
    assert tempfile.gettempdir() == elsewhere


WRITERS = 4


@pytest.fixture
def of_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of four ranks: a file of each, and an index by rank 0."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: WRITERS)
    for rank in range(WRITERS):
        own = tmp_path / f"of-{rank}"
        own.mkdir()
        (own / f"__{rank}_0.distcp").write_text(f"shard of rank {rank}")
        if rank == 0:
            (own / ".metadata").write_text("which tensor is where")
        monkeypatch.setattr(checkpoint.dist, "get_rank", lambda rank=rank: rank)
        checkpoint.seal(own, 7, {})
        for file in own.iterdir():
            file.rename(folder / file.name)
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names, digest = [], checkpoint.file_digest
    monkeypatch.setattr(checkpoint, "file_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_each_rank_checks_what_it_reads(of_four: Path, hashed: list[str]) -> None:
    for rank in range(WRITERS):
        hashed.clear()
        assert checkpoint.check(of_four, {}, "", share=(rank, WRITERS)) == 7
        assert sorted(hashed) == [".metadata", f"__{rank}_0.distcp"]


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_another_number_of_ranks_checks_every_file_once(of_four: Path, hashed: list[str], readers: int) -> None:
    for reader in range(readers):
        checkpoint.check(of_four, {}, "", any_workers=True, share=(reader, readers))
    assert [name for name in hashed if name != ".metadata"].count("__2_0.distcp") == 1
    assert {*hashed} == {".metadata", *(f"__{rank}_0.distcp" for rank in range(WRITERS))}
    assert len(hashed) == WRITERS + readers


@pytest.mark.parametrize("filesystem", [LocalFileSystem(), SubTreeFileSystem("/tmp", LocalFileSystem())])
def test_ranks_share_the_check_of_the_files_that_they_all_see(monkeypatch: pytest.MonkeyPatch, filesystem: Any) -> None:
    """Four ranks on two nodes: a store's files are on each node anew, for two."""
    context = SimpleNamespace(get_local_rank=lambda: 1, get_local_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: WRITERS)
    made = ray.train.Checkpoint("/tmp", filesystem)
    assert checkpoint._share_of_rank(made) == ((3, 4) if isinstance(filesystem, LocalFileSystem) else (1, 2))


def _restore(rank: int, folder: Path) -> None:
    """Restores as one of two processes, of which only rank 1 checks the damaged file."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    saved = folder / "saved"
    own = folder / f"of-{rank}"
    own.mkdir()
    (own / f"__{rank}_0.distcp").write_text(f"shard of rank {rank}")
    checkpoint.seal(own, 7, {})
    saved.mkdir(exist_ok=True)
    for file in own.iterdir():
        file.rename(saved / file.name)
    dist.barrier()
    job: Any = SimpleNamespace(
        identity=dict, checkpoints="iter_000/checkpoints", elastic=False, storage=Storage(folder)
    )
    loaded: list[Path] = []
    backend: Any = SimpleNamespace(load=loaded.append)
    ray.train.get_checkpoint = lambda: ray.train.Checkpoint.from_directory(saved)
    assert checkpoint.restore(job, backend) == 7
    assert loaded == [saved]
    dist.barrier()
    (saved / "__1_0.distcp").write_text("another shard")
    dist.barrier()
    try:
        checkpoint.restore(job, backend)
    except RunDirError as error:
        (folder / f"said-{rank}").write_text(str(error))
    assert loaded == [saved], "no rank unpickles what another has found damaged"
    dist.destroy_process_group()


@pytest.mark.slow
def test_no_rank_loads_a_checkpoint_of_which_another_has_found_a_damaged_file(tmp_path: Path) -> None:
    run_ranks(_restore, (tmp_path,), 2)
    for rank in range(2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert said.startswith(f"{tmp_path}/saved/__1_0.distcp: is missing or differs from its digest")
