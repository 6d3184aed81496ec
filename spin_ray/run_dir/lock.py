"""A lock between processes; the kernel releases it when its process ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAUSE_S = 0.01


@contextmanager
def file_lock(path: Path, *, alone: bool, timeout_s: float) -> Iterator[None]:
    """Holds the lock on ``path``, shared unless ``alone``.

    Raises:
        TimeoutError: others held the lock for ``timeout_s``.
        OSError: the file cannot be made or locked.
    """
    deadline = time.monotonic() + timeout_s
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(PAUSE_S)
        try:
            yield
        finally:  # a process forked meanwhile has the file, too, and would keep the lock
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
