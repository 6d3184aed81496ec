"""Models cached on each machine, in folders named by their digest.

CACHE/<digest of files>/                        a model, filled under another name and synced before it gets this one
CACHE/<digest of files>.<path and boot>.whole   sizes and times of the files when they were as their digests
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.boot import boot_id
from spin_ray.run_dir.lock import file_lock
from spin_ray.run_dir.storage import Digest, bytes_digest, file_digest, folder_digest, fsync, give_usual_modes

logger = logging.getLogger(__name__)

FILL_TIMEOUT_S = 7200.0
_own = ExitStack()
"""Locks on this process's folders, which the kernel drops with the process."""


def cache_root() -> Path:
    """Returns an absolute path, because Ray workers have other working directories."""
    return Path(os.environ.get("SPIN_RAY_CACHE") or "~/.cache/spin-ray").expanduser().absolute()


def without_weights(files: Mapping[str, Digest]) -> dict[str, Digest]:
    return {name: found for name, found in files.items() if not name.endswith(".safetensors")}


def folder_with(root: Path, files: Mapping[str, Digest], fetch: Callable[[str, Path], None], where: str) -> Path:
    """Returns the folder with ``files``; if missing or damaged, calls ``fetch(name, target)`` for each file.

    Raises:
        RunDirError: a fetched file differs from its digest.
        StageError: another process took longer than ``FILL_TIMEOUT_S``.
    """
    target = root / folder_digest(files)
    if is_whole(target, files, root):
        return target
    with filling(target, lambda: is_whole(target, files, root)) as attempt:
        if attempt is None:
            return target
        for name, expected in files.items():
            (attempt / name).parent.mkdir(parents=True, exist_ok=True)
            fetch(name, attempt / name)
            if file_digest(attempt / name) != expected:
                raise RunDirError(f"{where}/{name}: differs from its digest; restore it or remove {where}")
        _write_note(_note(root, target, files), _looks(attempt, files))
    return target


def is_whole(folder: Path, files: Mapping[str, Digest], root: Path) -> bool:
    """Tells whether ``folder`` has ``files``.

    The files are read once a boot, by one process, and again if a size or time changes. ``root`` keeps a note of it.
    """

    def is_noted() -> bool:
        with suppress(OSError, ValueError):
            return looks is not None and json.loads(note.read_text()) == looks
        return False

    looks, note = _looks(folder, files), _note(root, folder, files)
    if looks is None or is_noted():
        return looks is not None
    with locked(root, note.name):
        if not is_noted():
            if any(file_digest(folder / name) != expected for name, expected in files.items()):
                return False
            _write_note(note, looks)
    return True


def _write_note(note: Path, looks: list[list[Any]] | None) -> None:
    with suppress(OSError):  # on a full disk the files are read once more
        note.write_text(json.dumps(looks))


def _note(root: Path, folder: Path, files: Mapping[str, Digest]) -> Path:
    """Returns a path of this boot, as machines may share ``root``."""
    place = bytes_digest(f"{folder} {boot_id()}".encode()).sha256[:16]
    return root / f"{folder_digest(files)}.{place}.whole"


def _looks(folder: Path, files: Mapping[str, Digest]) -> list[list[Any]] | None:
    """Returns name, size and time of each file; None if one is missing or has another size."""
    try:
        stats = {name: (folder / name).stat() for name in sorted(files)}
    except OSError:
        return None
    if any(stat.st_size != files[name].bytes for name, stat in stats.items()):
        return None
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]


@contextmanager
def filling(target: Path, is_filled: Callable[[], bool] | None = None) -> Iterator[Path | None]:
    """Yields a folder that becomes ``target`` if nothing is raised; None where ``target`` is filled by now.

    Args:
        is_filled: False for a ``target`` that is damaged and will be replaced. None: one that is there is filled.

    Raises:
        StageError: another process took longer than ``FILL_TIMEOUT_S``.
    """
    with locked(target.parent, target.name):
        if is_filled() if is_filled else target.is_dir():
            yield None
            return
        attempt = target.with_name(f"attempt-{target.name}")
        shutil.rmtree(attempt, ignore_errors=True)  # of a process that was killed
        if target.exists():
            logger.warning("%s: is damaged (differs from its digest); it is made again", target)
            target.rename(attempt)
            shutil.rmtree(attempt)
        attempt.mkdir()
        try:
            yield attempt
            give_usual_modes(attempt)
            for path in [*attempt.rglob("*"), attempt]:
                fsync(path)
            attempt.rename(target)
            fsync(target.parent)
        except BaseException:
            shutil.rmtree(attempt, ignore_errors=True)
            raise


def new_attempt(root: Path) -> Path:
    """Makes a folder to fill, within this process's own."""
    return Path(tempfile.mkdtemp(dir=_own_folder(root)))


@cache
def _own_folder(root: Path) -> Path:
    """Makes the folder of this process's attempts, and removes those of processes that have ended."""
    with locked(root, "attempts"):
        for lock in root.glob("attempt-*.lock"):
            with suppress(TimeoutError), file_lock(lock, alone=True, timeout_s=0):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
        folder = Path(tempfile.mkdtemp(prefix="attempt-", dir=root))
        _own.enter_context(file_lock(folder.with_suffix(".lock"), alone=True, timeout_s=0))
    return folder


@contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Lets one process of this machine at a time fill ``name``.

    Raises:
        StageError: another process held it for ``FILL_TIMEOUT_S``.
    """
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(root / f"{name}.lock", alone=True, timeout_s=FILL_TIMEOUT_S))
        except TimeoutError as error:
            raise StageError(
                f"{root / name}: waited {FILL_TIMEOUT_S:.0f} s for another process to fill it; "
                "see what holds it, then run the command again"
            ) from error
        yield
