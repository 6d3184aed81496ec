"""Models cached on each machine, in folders named by their digest."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.lock import file_lock
from spin_ray.run_dir.storage import Digest, file_digest, folder_digest

FILL_TIMEOUT_S = 7200.0


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
