"""Durable files below one root.

A file is written and fsynced under a temporary name, then gets its final name in one step. Only logs are written in
place.
"""

import errno
import hashlib
import os
import random
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from spin_ray.config.paths import is_remote, local_path
from spin_ray.errors import ConfigError, RunDirError, StageError
from spin_ray.run_dir.fence import LEASE, check_token, locked

MANIFEST = "_MANIFEST.json"
"""File whose existence commits an artefact."""
ATTEMPTS = ".attempts"
"""Folder of unfinished files, deleted when a run starts."""
UPDATE_TIMEOUT_S = 180.0


class Digest(NamedTuple):
    sha256: str
    bytes: int


class Disk:
    """All calls that change a run folder; tests substitute a faulty disk."""

    def make_folder(self, path: Path) -> None:
        """Makes ``path`` and its parents, safe from a power cut."""
        if not path.is_dir():
            self.make_folder(path.parent)
            path.mkdir(exist_ok=True)
            fsync(path.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Writes a new file, not yet safe from a power cut."""
        with path.open("xb") as file:
            file.write(data)

    def append(self, path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        fsync(path)

    def link(self, source: Path, target: Path) -> None:
        """Gives a file a second name; raises FileExistsError where a rename would replace a file.

        Raises:
            RunDirError: the file system has no hard links.
        """
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise RunDirError(
                f"{target.parent}: its file system makes no hard links ({error.strerror}), which a run needs; choose "
                "another --out"
            ) from error

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def rename_folder(self, source: Path, target: Path) -> None:
        """Renames a folder; raises OSError if ``target`` has files."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Storage:
    """Files below a root folder, addressed by relative POSIX paths.

    Every node must see the root under the same path.

    Raises:
        RunDirError: a file or folder belongs to another user, who keeps it from being read.
        StageError: from every change, if the disk is full or fails.
        RunDirError: from every change, if another driver has taken the run over.
    """

    root: Path | str

    def __init__(self, root: str | Path, disk: Disk | None = None, token: str | None = None) -> None:
        if is_remote(str(root)):
            raise ConfigError(f"{root}: this reads local and shared folders only; copy the run from the store first")
        self.root = self._folder = local_path(str(root))
        self._disk = disk or Disk()
        self._token = token

    def fenced(self, token: str) -> "Storage":
        """Returns storage that makes changes only while the lease has ``token``."""
        return Storage(self._folder, self._disk, token)

    def refuse_missing(self) -> None:
        """Raises ConfigError if nothing can hold the root: a store lacks the bucket. A folder is made when needed."""

    def refuse_gone(self) -> None:
        """Raises RunDirError if a driver finds neither lease nor run.json: the whole folder is gone."""
        if self._token is not None and not self.exists(LEASE) and not self.exists("run.json"):
            raise RunDirError(
                f"{self.root}: the folder is gone while the run wrote to it (moved, unmounted, or not shared with this "
                "machine?); move it back, or give its new place to --out"
            )

    @property
    def name(self) -> str:
        return str(self.root).rpartition("/")[2]

    def path(self, name: str) -> Path:
        """Returns the local path; an object store raises ConfigError."""
        return self._folder / name

    def where(self, name: str) -> str:
        return str(self.path(name))

    def local_folder(self, name: str, files: Mapping[str, Digest]) -> Path:
        """Returns a local folder with ``files``."""
        return self.path(name)

    def entries(self, folder: str = "") -> list[str]:
        """Returns the names of files and folders in ``folder``; none if it does not exist."""
        try:
            with _reading(self.path(folder)):
                return sorted(entry.name for entry in self.path(folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def find(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Replaces ``name`` by ``new`` if it holds ``old``; None stands for no file."""
        self.refuse_gone()  # the lock would make the folder again
        with locked(self._folder, alone=True):
            self._check_lease()
            if self.find(name) != old:
                return False
            unfenced = Storage(self._folder, self._disk)  # as the lock is held already
            if new is None:
                unfenced.delete(name)
            else:
                unfenced.replace(name, new)
            return True

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replaces ``name`` by ``change`` of what it holds, made again while other processes are faster.

        Raises:
            StageError: they were for ``UPDATE_TIMEOUT_S``.
        """
        deadline = time.monotonic() + UPDATE_TIMEOUT_S
        while (new := change(old := self.find(name))) != old and not self.swap(name, old, new):
            if time.monotonic() > deadline:
                raise self._busy(name)
            time.sleep(random.uniform(0, 0.1))
        return new

    def _busy(self, name: str) -> StageError:
        return StageError(
            f"{self.where(name)}: other processes changed it all the time for {UPDATE_TIMEOUT_S:.0f} s; end them and "
            "run again"
        )

    def exists(self, name: str) -> bool:
        with _reading(self.path(name)):
            return self.path(name).exists()

    def read(self, name: str) -> bytes:
        with _reading(self.path(name)):
            return self.path(name).read_bytes()

    def create(self, name: str, data: bytes) -> None:
        """Creates ``name``, or raises FileExistsError and changes nothing."""
        target = self.path(name)
        with self._changing(target), self._attempt(data) as attempt, self._held():
            self._disk.make_folder(target.parent)
            self._disk.link(attempt, target)
            self._disk.sync(target.parent)

    def replace(self, name: str, data: bytes) -> None:
        """Replaces ``name`` atomically."""
        target = self.path(name)
        with self._changing(target), self._attempt(data) as attempt, self._held():
            self._disk.make_folder(target.parent)
            self._disk.replace(attempt, target)
            self._disk.sync(target.parent)

    def append(self, name: str, text: str) -> None:
        """Appends to a log, after ending a line that a crash cut short.

        Others wait, because two clients of NFS that append at once write to the same place.
        """
        target = self.path(name)
        with self._changing(target), locked(self._folder, alone=True):
            self._check_lease()
            self._disk.make_folder(target.parent)
            self._disk.append(target, (b"" if _ends_with_newline(target) else b"\n") + text.encode())

    def new_attempt_folder(self) -> Path:
        """Makes a folder to fill for ``create_folder``."""
        folder = self.path(f"{ATTEMPTS}/{uuid.uuid4().hex}")
        with self._changing(folder):
            self._disk.make_folder(folder)
        return folder

    def create_folder(self, name: str, attempt: Path) -> None:
        """Renames the folder ``attempt`` to ``name``, or raises FileExistsError."""
        target = self.path(name)
        with self._changing(target):
            give_usual_modes(attempt)
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
        with self._changing(self.path(name)), self._held():
            self._disk.remove(self.path(name))

    def digest(self, name: str) -> Digest:
        with _reading(self.path(name)):
            return file_digest(self.path(name))

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Checks the lease, and keeps it during a change; slow writes come before."""
        if self._token is None:
            yield
            return
        with locked(self._folder, alone=False):
            self._check_lease()
            yield

    def _check_lease(self) -> None:
        if self._token is not None:
            check_token(self._token, self.find(LEASE), str(self.root))

    @contextmanager
    def _changing(self, target: Path) -> Iterator[None]:
        self.refuse_gone()  # an attempt and the lock would make the folder again
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
        attempt = self.path(f"{ATTEMPTS}/{uuid.uuid4().hex}")
        self._disk.make_folder(attempt.parent)
        try:
            self._disk.write(attempt, data)
            self._disk.sync(attempt)
            yield attempt
        finally:
            self._disk.remove(attempt)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror})") from error


def _ends_with_newline(path: Path) -> bool:
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
    @property
    def sha256(self) -> str: ...


def folder_digest(files: Mapping[str, HasDigest]) -> str:
    lines = "".join(f"{entry.sha256} {name}\n" for name, entry in sorted(files.items()))
    return bytes_digest(lines.encode()).sha256


def table_to_bytes(table: pa.Table) -> bytes:
    """Returns Parquet bytes; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def give_usual_modes(folder: Path) -> None:
    """Gives the files below ``folder`` the permissions of new files there, e.g. by the umask.

    safetensors 0.8 lets nobody but the owner read what it writes, so that no other account of a group could go on with
    a run, or serve its models.
    """
    probe = folder / f".mode-{uuid.uuid4().hex}"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and (mode := stat.S_IMODE(path.stat().st_mode)) | usual != mode:
            path.chmod(mode | usual)


def fsync(path: Path) -> None:
    """Syncs a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
