"""Durable bytes below one root: atomic create, atomic replace, digests.

Every byte of a run is committed in the same way: it is written to a file of the attempt's own and fsynced, and then
the file gets its final name in one step. A reader sees all of a file or none.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from spin_ray.errors import ConfigError, StageError
from spin_ray.run_dir.fence import LEASE, check_token, locked

MANIFEST = "_MANIFEST.json"
"""The file of an artefact whose appearance commits it."""
ATTEMPTS = ".attempts"
"""Folder below the root for files being written; never read, and removed when a run starts."""


class Digest(NamedTuple):
    sha256: str
    bytes: int


class Disk:
    """The calls that change a run folder, one method for each kind of change.

    Every change to a run folder is one call of one of these methods. Tests inject faults by substituting this class.
    """

    def make_folder(self, path: Path) -> None:
        """Makes ``path`` and the parents it lacks; their names survive a power cut."""
        if not path.is_dir():
            self.make_folder(path.parent)
            path.mkdir(exist_ok=True)
            fsync(path.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Writes a new file, which a power cut can still lose."""
        with path.open("xb") as file:
            file.write(data)

    def append(self, path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        fsync(path)

    def link(self, source: Path, target: Path) -> None:
        """Gives a file a second name.

        Raises:
            FileExistsError: there is a file of that name; a rename would replace it.
        """
        os.link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def rename_folder(self, source: Path, target: Path) -> None:
        """Renames a folder; raises OSError if ``target`` is a folder with files in it."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Removes a file or a whole folder, if there is one."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Storage:
    """Files below a root folder, addressed by relative POSIX paths such as ``iter_000/pairs/part-00000.parquet``.

    Instances hold only the root and the token of the lease, so they travel to Ray actors. The root must be visible
    under the same path on every node (one machine, NFS, a ReadWriteMany volume).

    Raises:
        StageError: from every method that changes something, if the disk is full or fails.
        RunDirError: from the same methods, if another driver has taken the run over.
    """

    root: Path | str
    """Path or URI of the run, for messages."""

    def __init__(self, root: str | Path, disk: Disk | None = None, token: str | None = None) -> None:
        if "://" in str(root) and not str(root).startswith("file://"):
            raise ConfigError(f"{root}: this reads local and shared folders only; copy the run from the store first")
        self.root = self._folder = Path(str(root).removeprefix("file://")).expanduser().absolute()
        self._disk = disk or Disk()
        self._token = token

    def fenced(self, token: str) -> "Storage":
        """Returns storage of the same files that changes them only while the lease has ``token``."""
        return Storage(self._folder, self._disk, token)

    @property
    def name(self) -> str:
        """Name of the run: the last part of the root."""
        return str(self.root).rpartition("/")[2]

    def path(self, name: str) -> Path:
        """Returns the local path of ``name``; an object store raises ConfigError."""
        return self._folder / name

    def where(self, name: str) -> str:
        """Returns the full path or URI of ``name``."""
        return str(self.path(name))

    def local_folder(self, name: str, files: Mapping[str, Digest]) -> Path:
        """Returns a folder of this machine with ``files`` of ``name``, for libraries that open files themselves."""
        return self.path(name)

    def entries(self) -> list[str]:
        """Returns the names of the files and folders at the top."""
        return sorted(entry.name for entry in self._folder.glob("*"))

    def find(self, name: str) -> bytes | None:
        """Returns the bytes of ``name``; None if it is not there."""
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Makes ``name`` hold ``new`` if it holds ``old``, else returns False. None stands for no file."""
        with locked(self._folder, alone=True):
            if self.find(name) != old:
                return False
            if new is None:
                self.delete(name)
            else:
                self.replace(name, new)
            return True

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self, folder: str) -> list[str]:
        """Returns the sorted names of the files in ``folder``; none if there is no such folder."""
        try:
            return sorted(entry.name for entry in self.path(folder).iterdir() if entry.is_file())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def create(self, name: str, data: bytes) -> None:
        """Creates ``name`` with ``data``, or raises FileExistsError and changes nothing."""
        target = self.path(name)
        with self._changing(target), self._attempt(data) as attempt, self._held():
            self._disk.make_folder(target.parent)
            self._disk.link(attempt, target)
            self._disk.sync(target.parent)

    def replace(self, name: str, data: bytes) -> None:
        """Writes ``data`` to ``name``; a reader sees the old bytes or the new ones."""
        target = self.path(name)
        with self._changing(target), self._attempt(data) as attempt, self._held():
            self._disk.make_folder(target.parent)
            self._disk.replace(attempt, target)
            self._disk.sync(target.parent)

    def append(self, name: str, text: str) -> None:
        """Adds ``text`` to a log that has one writer at a time."""
        target = self.path(name)
        with self._changing(target), self._held():
            self._disk.make_folder(target.parent)
            # A line that a crash cut short is ended first.
            self._disk.append(target, (b"" if _ends_with_newline(target) else b"\n") + text.encode())

    def new_attempt_folder(self) -> Path:
        """Makes a folder in which to build an artefact for ``create_folder``."""
        folder = self.path(f"{ATTEMPTS}/{uuid.uuid4().hex}")
        with self._changing(folder):
            self._disk.make_folder(folder)
        return folder

    def create_folder(self, name: str, attempt: Path) -> None:
        """Renames the folder ``attempt`` to ``name``, or raises FileExistsError."""
        target = self.path(name)
        with self._changing(target):
            for path in sorted(attempt.rglob("*"), reverse=True):  # the content of a folder before the folder
                self._disk.sync(path)
            self._disk.sync(attempt)
            with self._held():
                self._disk.make_folder(target.parent)
                try:
                    self._disk.rename_folder(attempt, target)
                except OSError as error:
                    if target.exists() and attempt.exists():
                        raise FileExistsError(f"{target} is there already") from error
                    raise
                self._disk.sync(target.parent)

    def delete(self, name: str) -> None:
        """Removes a file or a folder, if there is one."""
        with self._changing(self.path(name)), self._held():
            self._disk.remove(self.path(name))

    def digest(self, name: str) -> Digest:
        return file_digest(self.path(name))

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Checks the lease, and keeps it from changing hands for the moment of a change.

        Writing and syncing the bytes is slow, and comes before that moment.
        """
        if self._token is None:
            yield
            return
        with locked(self._folder, alone=False):
            check_token(self._token, self.find(LEASE), str(self.root))
            yield

    @contextmanager
    def _changing(self, target: Path) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise StageError(
                f"{target}: could not be written ({error.strerror}); see to that and run the command again, "
                "everything committed is kept"
            ) from error

    @contextmanager
    def _attempt(self, data: bytes) -> Iterator[Path]:
        """Writes ``data`` to a file of its own and syncs it; its name is removed afterwards."""
        attempt = self.path(f"{ATTEMPTS}/{uuid.uuid4().hex}")
        self._disk.make_folder(attempt.parent)
        try:
            self._disk.write(attempt, data)
            self._disk.sync(attempt)
            yield attempt
        finally:
            self._disk.remove(attempt)


def _ends_with_newline(path: Path) -> bool:
    """Tells whether the last line of a log is whole; True without a log."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def file_digest(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def bytes_digest(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest(), len(data))


class HasDigest(Protocol):
    """A file as a manifest or a ``Digest`` describes it."""

    @property
    def sha256(self) -> str: ...


def folder_digest(files: Mapping[str, HasDigest]) -> str:
    """Returns one digest of names and contents."""
    lines = "".join(f"{entry.sha256} {name}\n" for name, entry in sorted(files.items()))
    return bytes_digest(lines.encode()).sha256


def table_to_bytes(table: pa.Table) -> bytes:
    """Returns the Parquet bytes of ``table``; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def fsync(path: Path) -> None:
    """Syncs a file or the names in a folder to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
