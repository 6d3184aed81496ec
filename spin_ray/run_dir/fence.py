"""Guard of every change to a run: only the driver whose token is in the lease may make one.

A driver changes the run while it holds the lock together with others, and reads the lease first. The lease changes
hands only while the lock is held alone. So no other driver can take over between the look at the lease and the change,
not even when the first driver is paused there.
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
"""Longest wait for the lock. A change takes milliseconds; only a process paused within one takes longer."""


@contextmanager
def locked(root: Path, *, alone: bool) -> Iterator[None]:
    """Holds the lock of the run.

    Raises:
        RunDirError: the folder cannot hold a run, or somebody held the lock for all of ``LOCK_TIMEOUT_S``.
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
    """Returns the content of the lease; None if nobody holds the run.

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
    """Checks that the lease has this token.

    Raises:
        RunDirError: another driver has the lease, or it is gone.
    """
    holder = holder_in(lease, f"{root}/{LEASE}")
    if holder is None or holder["token"] != token:
        now = f"process {holder['pid']} on {holder['host']}" if holder else "nobody (the lease file is gone)"
        raise RunDirError(f"{root}: the lease was taken over by {now}; this driver stops")
