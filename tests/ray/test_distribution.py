"""A folder that another machine gives: taken in parts, trusted by digest only. Real nodes are in test_many_nodes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from spin_ray.errors import RunDirError
from spin_ray.run_dir.storage import bytes_digest
from spin_ray.runtime import model_sharing as distribution
from spin_ray.runtime.model_sharing import SharedFolder
from tests.support.counting_giver import CountingGiver

FILES = {"config.json": b"{}", "weights/model.safetensors": b"0123456789", "empty.txt": b""}
DIGESTS = {name: bytes_digest(data) for name, data in FILES.items()}


def write(folder: Path, **changed: bytes) -> Path:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(changed.get(Path(name).stem, data))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(distribution, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def giver(tmp_path: Path) -> Iterator[Any]:
    """An actor of another machine, as far as this process can tell; nine bytes in parts of three, and one more."""
    actor = ray.remote(CountingGiver).options(name="giver", num_cpus=0).remote(write(tmp_path / "there"), DIGESTS)
    yield actor
    ray.kill(actor)


def shared(folder: Path) -> SharedFolder:
    return SharedFolder(folder, DIGESTS, node="another", giver="giver", part_bytes=3)


def test_a_folder_arrives_in_parts_once(tmp_path: Path, cache: Path, giver: Any) -> None:
    found = shared(tmp_path / "not here").local_folder()
    assert found.parent == cache
    assert {name: (found / name).read_bytes() for name in FILES} == FILES
    assert shared(tmp_path / "not here").local_folder() == found
    weights = [("weights/model.safetensors", number) for number in range(4)]
    assert ray.get(giver.asked.remote()) == dict.fromkeys([("config.json", 0), *weights, ("empty.txt", 0)], 1)
    assert not list(cache.glob("attempt-*"))


def test_without_weights_only_the_rest_arrives(tmp_path: Path, cache: Path, giver: Any) -> None:
    found = shared(tmp_path / "not here").local_folder(weights=False)
    assert sorted(path.name for path in found.rglob("*") if path.is_file()) == ["config.json", "empty.txt"]
    assert {name for name, _ in ray.get(giver.asked.remote())} == {"config.json", "empty.txt"}


def test_the_same_content_at_the_same_path_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    here = write(tmp_path / "here")
    assert shared(here).local_folder() == here
    assert shared(here).local_folder() == here


def test_another_model_of_the_same_sizes_at_the_same_path_is_not(tmp_path: Path, cache: Path, giver: Any) -> None:
    here = write(tmp_path / "here")
    assert shared(here).local_folder() == here
    write(here, model=b"9876543210")
    found = shared(here).local_folder()
    assert found.parent == cache and (found / "weights/model.safetensors").read_bytes() == b"0123456789"


def test_what_changed_at_the_giver_is_refused_and_not_kept(tmp_path: Path, cache: Path, giver: Any) -> None:
    write(tmp_path / "there", model=b"0123456780")
    with pytest.raises(RunDirError, match=r"weights/model.safetensors: differs from its digest"):
        shared(tmp_path / "not here").local_folder()
    assert not [path for path in cache.iterdir() if path.is_dir()]
