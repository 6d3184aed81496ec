"""What each machine keeps of models: folders named by their content, filled once however many processes ask."""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.storage import Digest, bytes_digest, file_digest

FILL_TIMEOUT_S = 7200.0
"""Longest wait for another process of this machine to fill a folder."""


def identity(files: Mapping[str, Digest]) -> str:
    """One digest for names and contents."""
    return bytes_digest("".join(f"{name} {found.sha256}\n" for name, found in sorted(files.items())).encode()).sha256


def without_weights(files: Mapping[str, Digest]) -> dict[str, Digest]:
    """Of a model's files all that a tokenizer needs."""
    return {name: found for name, found in files.items() if not name.endswith(".safetensors")}


def folder_with(root: Path, files: Mapping[str, Digest], fetch: Callable[[str, Path], None], where: str) -> Path:
    """The folder below ``root`` that holds ``files``, after ``fetch(name, target)`` of each if it is not there yet.

    Raises:
        RunDirError: a file differs from its digest as it came from ``where``; nothing is kept.
        StageError: another process has been filling it for ``FILL_TIMEOUT_S``.
    """
    target = root / identity(files)
    if target.is_dir():
        return target
    with locked(root, target.name):
        if not target.is_dir():
            attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=root))
            try:
                for name, expected in files.items():
                    (attempt / name).parent.mkdir(parents=True, exist_ok=True)
                    fetch(name, attempt / name)
                    if file_digest(attempt / name) != expected:
                        raise RunDirError(f"{where}/{name}: differs from its digest; restore it or remove {where}")
                attempt.rename(target)
            except BaseException:
                shutil.rmtree(attempt, ignore_errors=True)
                raise
    return target


@contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """One process of this machine at a time; the kernel drops the lock of one that dies."""
    root.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + FILL_TIMEOUT_S
    with (root / f"{name}.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StageError(
                        f"{root / name}: waited {FILL_TIMEOUT_S:.0f} s for another process to fill it; "
                        "see what holds it, then run the command again"
                    ) from None
                time.sleep(0.1)
        yield
