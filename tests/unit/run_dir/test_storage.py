"""Durable bytes: a file appears whole and once, and what a crash leaves is never taken for one."""

import errno
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spin_ray.errors import ConfigError, RunDirError, StageError
from spin_ray.run_dir import storage as module
from spin_ray.run_dir.fence import LEASE
from spin_ray.run_dir.storage import (
    ATTEMPTS,
    Disk,
    Storage,
    bytes_digest,
    file_digest,
    table_from_bytes,
    table_to_bytes,
)


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path / "run")


class Crash(Exception):
    pass


def crash(*_: object, **__: object) -> None:
    raise Crash


def test_create_never_replaces(storage):
    storage.create("a/b.txt", b"first")
    with pytest.raises(FileExistsError):
        storage.create("a/b.txt", b"second")
    assert storage.read("a/b.txt") == b"first"


def test_of_many_writers_at_once_exactly_one_creates(storage):
    won = []

    def write(number: int) -> None:
        try:
            storage.create("file", str(number).encode() * 1000)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("file") == str(won[0]).encode() * 1000


def test_no_update_of_many_at_once_is_lost(storage):
    def count(_: int) -> None:
        storage.update("count", lambda content: str(int(content or b"0") + 1).encode())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(40)))
    assert storage.read("count") == b"40"


def test_a_driver_updates_while_it_has_the_lease_and_not_after(storage):
    """It does not wait for its own lock."""
    storage.replace(LEASE, b'{"token": "mine", "pid": 1, "host": "here"}')
    storage.fenced("mine").update("eval.json", lambda _: b"new")
    assert storage.read("eval.json") == b"new"
    with pytest.raises(RunDirError, match="the lease was taken over by process 1 on here"):
        storage.fenced("of another").update("eval.json", lambda _: b"late")
    assert storage.read("eval.json") == b"new"


def test_an_update_that_others_overtake_for_ever_says_so(storage, monkeypatch):
    monkeypatch.setattr(module, "UPDATE_TIMEOUT_S", 0.0)

    def overtaken(_: bytes | None) -> bytes:
        storage.replace("count", os.urandom(8))
        return b"mine"

    with pytest.raises(StageError, match=r"count: other processes changed it all the time for 0 s; end them"):
        storage.update("count", overtaken)


def test_replace_leaves_the_old_bytes_until_the_new_ones_are_whole(storage, monkeypatch):
    storage.replace("file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(Crash):
            storage.replace("file", b"new")
    assert storage.read("file") == b"old"
    storage.replace("file", b"new")
    assert storage.read("file") == b"new"


@pytest.mark.parametrize(
    ("write", "step"), [("create", "fsync"), ("create", "link"), ("replace", "fsync"), ("replace", "replace")]
)
def test_a_writer_that_dies_before_the_file_appears_leaves_nothing_under_its_name(storage, monkeypatch, write, step):
    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(Crash):
            getattr(storage, write)("folder/part-00000.parquet", b"data")
    assert not storage.exists("folder/part-00000.parquet")
    assert storage.entries("folder") == []


def test_bytes_are_on_disk_before_their_name_is(storage, monkeypatch):
    """fsync of the attempt, then the link, then fsync of the folder that holds the name."""
    steps = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "link", lambda *names: steps.append("link") or link(*names))
    storage.create("a/file", b"data")
    root, attempts = str(storage.root), str(storage.path(ATTEMPTS))
    parents = [os.path.dirname(root), root]  # as the folders are made, each in its parent
    assert steps[:2] == parents and steps[2].startswith(attempts + "/")
    assert steps[3:] == [root, "link", str(storage.path("a"))]


def test_nothing_is_left_among_the_attempts(storage):
    storage.create("one", b"1")
    storage.replace("one", b"2")
    with pytest.raises(FileExistsError):
        storage.create("one", b"3")
    assert storage.entries(ATTEMPTS) == []


def test_a_folder_appears_whole_and_never_replaces_another(storage):
    for content in ("first", "second"):
        attempt = storage.new_attempt_folder()
        (attempt / "sub").mkdir()
        (attempt / "sub/file").write_text(content)
        if content == "first":
            storage.create_folder("model", attempt)
        else:
            with pytest.raises(FileExistsError):
                storage.create_folder("model", attempt)
    assert storage.read("model/sub/file") == b"first"


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_have_the_permissions_of_other_files(storage, umask, expected):
    """safetensors writes files for the owner alone, whatever the umask."""
    before = os.umask(umask)
    try:
        attempt = storage.new_attempt_folder()
        save_file({"w": np.zeros(3, np.float32)}, attempt / "model.safetensors")
        storage.create_folder("model", attempt)
    finally:
        os.umask(before)
    assert stat.S_IMODE(storage.path("model/model.safetensors").stat().st_mode) == expected
    assert storage.entries("model") == ["model.safetensors"]


def test_a_file_system_without_hard_links_is_told(storage, monkeypatch):
    """As exFAT and some mounts of SMB."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RunDirError, match=r"/run/a: its file system makes no hard links .* choose another --out"):
        storage.create("a/b", b"")


def test_a_folder_that_cannot_be_moved_for_another_reason_says_so(storage):
    with pytest.raises(StageError, match=r"run/model: could not be written \(No such file or directory\)"):
        storage.create_folder("model", storage.path("none"))


def test_entries_are_the_files_and_folders_of_a_folder_sorted(storage):
    assert storage.entries("none") == []
    for name in ("b", "a", "c/d"):
        storage.create(f"folder/{name}", b"")
    assert storage.entries("folder") == ["a", "b", "c"]


def test_delete_takes_files_folders_and_nothing(storage):
    storage.create("folder/sub/file", b"")
    storage.create("file", b"")
    for name in ("folder", "file", "none"):
        storage.delete(name)
        assert not storage.exists(name)


def test_a_line_that_a_crash_cut_short_does_not_spoil_the_next_one(storage):
    storage.append("log", "one\n")
    storage.append("log", "tw")
    storage.append("log", "three\n")
    assert storage.read("log") == b"one\ntw\nthree\n"


def test_no_line_is_lost_where_two_machines_append_on_a_file_server(tmp_path):
    """A client of NFS looks for the end of a file, and then writes there."""

    class Nfs(Disk):
        def append(self, path: Path, data: bytes) -> None:
            end = path.stat().st_size if path.exists() else 0
            time.sleep(0.05)
            with path.open("r+b" if end else "wb") as file:
                file.seek(end)
                file.write(data)

    with ThreadPoolExecutor(2) as pool:
        for line in ("of the driver\n", "of the judge\n"):
            pool.submit(Storage(tmp_path, Nfs()).append, "events.jsonl", line)
    assert sorted((tmp_path / "events.jsonl").read_text().splitlines()) == ["of the driver", "of the judge"]


def test_digest_is_that_of_the_bytes(storage):
    """SHA-256 of nothing begins with e3b0c442."""
    storage.create("empty", b"")
    assert storage.digest("empty").sha256.startswith("e3b0c442")
    storage.create("file", b"data")
    assert storage.digest("file") == bytes_digest(b"data") == file_digest(storage.path("file"))
    assert storage.digest("file").bytes == 4


def test_a_folder_is_never_made_of_a_uri():
    with pytest.raises(ConfigError, match="s3://bucket/run: this reads local and shared folders only; copy the run"):
        Storage("s3://bucket/run")


def test_the_root_is_absolute_however_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given_root in ("run", "~/run", f"file://{tmp_path}/run", f"file://localhost{tmp_path}/run", tmp_path / "run"):
        assert Storage(given_root).root == tmp_path / "run"
    assert Storage(f"file://{tmp_path}/my%20run").root == tmp_path / "my run"
    (tmp_path / "my%20run").mkdir()
    assert Storage(f"file://{tmp_path}/my%20run").root == tmp_path / "my%20run"
    assert Storage("~nobody-of-this-name/run").root == tmp_path / "~nobody-of-this-name/run"
    for of_no_root in ("file://run", "file://~/run", "file://server/run"):
        with pytest.raises(ConfigError, match=f"^{of_no_root}: file:// takes an absolute path"):
            Storage(of_no_root)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)), max_size=8))
def test_a_table_comes_back_equal_and_equal_tables_are_equal_bytes(rows):
    schema = pa.schema([("text", pa.string()), ("ids", pa.list_(pa.int32()))])
    tables = [pa.Table.from_pylist([{"text": text, "ids": ids} for text, ids in rows], schema) for _ in range(2)]
    first, second = map(table_to_bytes, tables)
    assert first == second
    assert table_from_bytes(first).equals(tables[0])
