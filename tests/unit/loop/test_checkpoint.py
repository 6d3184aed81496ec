"""Checkpoints are moved within the run folder: no node needs room for them on another disk."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.train.v2._internal.execution.storage import StorageContext

from spin_ray.loop.stages.training import checkpoint


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
