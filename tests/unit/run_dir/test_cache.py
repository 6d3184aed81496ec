"""Folders that are filled: complete or not there, and nothing stays of a process that was killed."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spin_ray.errors import RunDirError
from spin_ray.run_dir import cache
from spin_ray.run_dir.cache import filling, folder_with, new_attempt
from spin_ray.run_dir.storage import Digest, bytes_digest

EMPTY = Digest("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 0)
OTHERS_ATTEMPT = """
import sys
from pathlib import Path
from spin_ray.run_dir.cache import new_attempt
print(new_attempt(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_an_attempt_outlives_no_process_that_was_killed(tmp_path: Path) -> None:
    """Of two processes one is alive: its folder stays."""
    others = [
        subprocess.Popen([sys.executable, "-c", OTHERS_ATTEMPT, tmp_path], stdin=-1, stdout=-1, text=True)
        for _ in range(2)
    ]
    try:
        folders = [Path(other.stdout.readline().strip()) for other in others if other.stdout]
        for folder in folders:
            (folder / "weights").write_text("many bytes")
        others[0].kill()
        others[0].wait(10)
        mine = [new_attempt(tmp_path) for _ in range(2)]
        assert not folders[0].exists()
        assert all(folder.is_dir() for folder in [folders[1], *mine])
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_what_a_killed_process_left_is_filled_anew(tmp_path: Path) -> None:
    (tmp_path / "attempt-model").mkdir()
    (tmp_path / "attempt-model/half").write_text("of a file")
    with filling(tmp_path / "model") as attempt:
        assert attempt
        (attempt / "whole").touch()
    assert [path.name for path in tmp_path.glob("model/*")] == ["whole"]
    with filling(tmp_path / "model") as attempt:
        assert attempt is None


def test_a_file_that_differs_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="there/file: differs from its digest"):
        folder_with(tmp_path, {"file": EMPTY}, lambda name, to: to.write_text("other") and None, "there")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


WEIGHTS = b"w" * 10_000
FILES = {"config.json": bytes_digest(b"{}"), "deep/model.safetensors": bytes_digest(WEIGHTS)}


class Store:
    """A store of ``FILES``; ``done`` has what happens to a file or folder, in turn."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.fetched, self.done = root, 0, list[tuple[str, str]]()
        for module, name in ((cache, "file_digest"), (cache, "fsync"), (Path, "rename")):
            monkeypatch.setattr(module, name, self._told(name, getattr(module, name)))

    def _told(self, what: str, call: Any) -> Any:
        def told(path: Path, *rest: Any) -> Any:
            self.done.append((what, path.name))
            return call(path, *rest)

        return told

    def _fetch(self, name: str, to: Path) -> None:
        self.fetched += 1
        to.write_bytes(WEIGHTS if name.endswith("safetensors") else b"{}")

    def folder(self) -> Path:
        found = folder_with(self.root, FILES, self._fetch, "s3://b/run/model")
        assert (found / "deep/model.safetensors").read_bytes() == WEIGHTS
        return found

    def folders_of_many(self) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: self.folder(), range(8)))

    def read(self) -> int:
        return [what for what, _ in self.done].count("file_digest")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(tmp_path / "cache", monkeypatch)


def lose(file: Path, *, like_a_disk: bool) -> None:
    """Overwrites a block; a disk that does so leaves the time."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(5000)
        opened.write(bytes(512))
    if like_a_disk:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_model_that_lost_bytes_with_the_power_is_fetched_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lose(store.folder() / "deep/model.safetensors", like_a_disk=True)
    monkeypatch.setattr(cache, "boot_id", lambda: "the next")
    folder = store.folder()
    assert store.fetched == 4
    assert caplog.messages == [f"{folder}: is damaged (differs from its digest); it is made again"]


def test_a_model_that_another_process_changed_or_cut_is_fetched_anew(store: Store) -> None:
    lose(store.folder() / "deep/model.safetensors", like_a_disk=False)
    (store.folder() / "config.json").unlink()
    store.folder()
    assert store.fetched == 6


def test_a_model_is_read_once_a_boot_for_its_digests_however_many_processes_want_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch reads both files, and eight ranks none; after a start of the machine one of the eight does."""
    store.folders_of_many()
    store.folders_of_many()
    assert store.read() == 2
    monkeypatch.setattr(cache, "boot_id", lambda: "the next")
    store.folders_of_many()
    assert store.read() == 4 and store.fetched == 2


def test_files_and_folders_are_on_the_disk_before_a_model_has_its_name_and_then_the_name(store: Store) -> None:
    folder = store.folder()
    attempt = f"attempt-{folder.name}"
    written = [(what, name) for what, name in store.done if what != "file_digest"]
    files = {("fsync", name) for name in ("config.json", "deep", "model.safetensors", attempt)}
    assert set(written[:-2]) == files and written[-2:] == [("rename", attempt), ("fsync", store.root.name)]


def test_a_whole_model_serves_where_no_note_of_it_can_be_written(store: Store) -> None:
    """A folder stands where the note would be, as a full disk would refuse it."""
    folder = store.folder()
    (note,) = store.root.glob("*.whole")
    note.unlink()
    note.mkdir()
    assert store.folder() == folder and store.fetched == 2
