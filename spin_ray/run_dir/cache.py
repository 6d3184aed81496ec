"""Models cached on each machine, in folders named by their digest."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.lock import file_lock
from spin_ray.run_dir.storage import Digest, file_digest, folder_digest

FILL_TIMEOUT_S = 7200.0
_own = ExitStack()
"""Locks on this process's folders, which the kernel drops with the process."""


def cache_root() -> Path:
    """Returns an absolute path, because Ray workers have other working directories."""
    return Path(os.environ.get("SPIN_RAY_CACHE") or "~/.cache/spin-ray").expanduser().absolute()


def without_weights(files: Mapping[str, Digest]) -> dict[str, Digest]:
    return {name: found for name, found in files.items() if not name.endswith(".safetensors")}


def folder_with(root: Path, files: Mapping[str, Digest], fetch: Callable[[str, Path], None], where: str) -> Path:
    """Returns the folder with ``files``; if missing, calls ``fetch(name, target)`` for each file.

    Raises:
        RunDirError: a fetched file differs from its digest.
        StageError: another process took longer than ``FILL_TIMEOUT_S``.
    """
    target = root / folder_digest(files)
    if target.is_dir():
        return target
    with filling(target) as attempt:
        if attempt is None:
            return target
        for name, expected in files.items():
            (attempt / name).parent.mkdir(parents=True, exist_ok=True)
            fetch(name, attempt / name)
            if file_digest(attempt / name) != expected:
                raise RunDirError(f"{where}/{name}: differs from its digest; restore it or remove {where}")
    return target


@contextmanager
def filling(target: Path) -> Iterator[Path | None]:
    """Yields a folder that becomes ``target`` if nothing is raised; None where ``target`` is there by now.

    Raises:
        StageError: another process took longer than ``FILL_TIMEOUT_S``.
    """
    with locked(target.parent, target.name):
        if target.is_dir():
            yield None
            return
        attempt = target.with_name(f"attempt-{target.name}")
        shutil.rmtree(attempt, ignore_errors=True)  # of a process that was killed
        attempt.mkdir()
        try:
            yield attempt
            attempt.rename(target)
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
