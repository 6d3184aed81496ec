"""Guard of every change to a run: only the driver whose token is in the lease may make one.

The driver reads the lease and makes the change under a shared lock. The lease changes hands only under the exclusive
lock, so never in between.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from spin_ray.errors import RunDirError
from spin_ray.run_dir.lock import file_lock

LEASE = "lease.json"
LOCK_TIMEOUT_S = 60.0
"""Longest wait for the lock; a change takes milliseconds."""


@contextmanager
def locked(root: Path, *, alone: bool) -> Iterator[None]:
    """Holds the run's lock, shared unless ``alone``.

    Raises:
        RunDirError: the folder cannot hold a run, or others held the lock for ``LOCK_TIMEOUT_S``.
    """
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(root / ".lease.lock", alone=alone, timeout_s=LOCK_TIMEOUT_S))
        except TimeoutError as error:
            raise RunDirError(
                f"{root}: waited {LOCK_TIMEOUT_S:g} s for a change of another process to end; a process of the "
                "run may be paused: end it, then run the command again"
            ) from error
        except OSError as error:
            raise RunDirError(f"{root}: cannot hold a run ({error.strerror}); choose another --out") from error
        yield


def holder_in(lease: bytes | None, where: str) -> dict[str, Any] | None:
    """Returns the lease's content; None if nobody holds the run.

    Raises:
        RunDirError: the lease is damaged.
    """
    if lease is None:
        return None
    try:
        return json.loads(lease)
    except ValueError as error:
        raise RunDirError(f"{where}: is damaged; remove it if no other driver works on this run") from error


def check_token(token: str, lease: bytes | None, root: str) -> None:
    """Checks the lease's token.

    Raises:
        RunDirError: another driver has the lease, or the lease is missing or damaged.
    """
    holder = holder_in(lease, f"{root}/{LEASE}")
    if holder is None or holder["token"] != token:
        now = f"process {holder['pid']} on {holder['host']}" if holder else "nobody (the lease file is gone)"
        raise RunDirError(f"{root}: the lease was taken over by {now}; this driver stops")
