"""Durable bytes below one root: atomic create, atomic replace, digests.

Everything a run keeps passes through here, so that "committed" means one thing: the bytes were written to an
attempt-unique file, fsynced, and then appeared under their final name in a single step. A reader sees all of
a file or none.
"""

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from spin_ray.errors import ConfigError

ATTEMPTS = ".attempts"
"""Folder below the root that holds files and folders being written; never read, removed when a run starts."""


class Digest(NamedTuple):
    sha256: str
    bytes: int


class Storage:
    """Files below a root folder, addressed by relative POSIX paths such as ``iter_000/pairs/part-00000.parquet``.

    Instances hold only the root, so they travel to Ray actors. The root must be visible under the same path on every
    node (one machine, NFS, a ReadWriteMany volume).
    """

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        if "://" in text and not text.startswith("file://"):
            raise ConfigError(
                f"{text}: a run directory must be a local or shared folder; object stores are not supported yet"
            )
        self.root = Path(text.removeprefix("file://")).expanduser().absolute()

    def path(self, name: str) -> Path:
        """The local path of ``name``, for libraries that open files themselves."""
        return self.root / name

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self, folder: str) -> list[str]:
        """Names of the files in ``folder``, sorted; none if there is no such folder."""
        try:
            return sorted(entry.name for entry in self.path(folder).iterdir() if entry.is_file())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def create(self, name: str, data: bytes) -> None:
        """Makes ``name`` appear with ``data``, or raises FileExistsError and changes nothing."""
        attempt = self._write_attempt(data)
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(attempt, target)  # unlike rename, a link never replaces a file that is already there
        finally:
            attempt.unlink()
        fsync(target.parent)

    def replace(self, name: str, data: bytes) -> None:
        """Makes ``name`` hold ``data``; a reader sees the old bytes or the new ones."""
        attempt = self._write_attempt(data)
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(attempt, target)
        fsync(target.parent)

    def append(self, name: str, text: str) -> None:
        """Adds ``text`` to a log that has one writer at a time."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")  # a crash cut the last line short
            file.write(text.encode())

    def new_attempt_folder(self) -> Path:
        """A fresh folder to build a directory artefact in; see ``create_folder``."""
        folder = self.path(f"{ATTEMPTS}/{uuid.uuid4().hex}")
        folder.mkdir(parents=True)
        return folder

    def create_folder(self, name: str, attempt: Path) -> None:
        """Makes the folder ``attempt`` appear as ``name``, or raises FileExistsError."""
        for file in attempt.rglob("*"):
            if file.is_file():
                fsync(file)
        for folder in [attempt, *(entry for entry in attempt.rglob("*") if entry.is_dir())]:
            fsync(folder)
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(attempt, target)  # fails on a folder that has files in it
        except OSError as error:
            if target.exists():
                raise FileExistsError(f"{target} is there already") from error
            raise
        fsync(target.parent)

    def delete(self, name: str) -> None:
        """Removes a file or a folder; nothing happens if there is none."""
        target = self.path(name)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def digest(self, name: str) -> Digest:
        return file_digest(self.path(name))

    def _write_attempt(self, data: bytes) -> Path:
        attempt = self.path(f"{ATTEMPTS}/{uuid.uuid4().hex}")
        attempt.parent.mkdir(parents=True, exist_ok=True)
        with attempt.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return attempt


def file_digest(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def bytes_digest(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest(), len(data))


def table_to_bytes(table: pa.Table) -> bytes:
    """Parquet bytes of ``table``; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def fsync(path: Path) -> None:
    """Makes what was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
