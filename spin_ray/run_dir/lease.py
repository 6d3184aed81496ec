"""The lease on a run: a file that its only driver renews."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.boot import boot_id
from spin_ray.run_dir.fence import LEASE, holder_in
from spin_ray.run_dir.storage import Storage

logger = logging.getLogger(__name__)

_held: set[str] = set()
"""Tokens of this process's leases; a notebook's earlier driver may have left others."""


class Lease:
    """The right of one driver to change a run.

    A lease from this machine is stale once its process is gone; from elsewhere, when not renewed for ``timeout_s``.
    Entering waits that long for one from elsewhere: a RayJob tries again while the lease of its lost head is fresh.

    Raises:
        RunDirError: on entering, another driver of this machine lives, or one from elsewhere renews its lease.
    """

    def __init__(self, storage: Storage, timeout_s: float) -> None:
        self._storage = storage
        self._timeout_s = timeout_s
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)

    def __enter__(self) -> Self:
        _held.add(self._token)  # before it is written: another thread would take over a token that nobody holds
        try:
            self._take()
        except BaseException:
            _held.discard(self._token)
            raise
        self._renewer.start()
        return self

    def _take(self) -> None:
        first, began = None, 0.0
        while True:  # repeated if another driver was faster
            found = self._storage.find(LEASE)
            holder = holder_in(found, f"{self._storage.root}/{LEASE}")
            if holder is not None and not _is_stale(holder, self._timeout_s):
                if holder["boot"] == _boot_id() or first not in (None, found):
                    raise RunDirError(f"{self._in_use(holder)}; wait for it, stop it, or choose another --out")
                if first is None:
                    first, began = found, time.monotonic()
                    logger.warning("%s: waiting up to %.0f s to see if it lives", self._in_use(holder), self._timeout_s)
                if time.monotonic() - began < self._timeout_s:
                    time.sleep(min(1.0, self._timeout_s / 10))
                    continue
            if self._write_over(found):
                break
        if holder is not None:
            logger.warning("took over the lease of %s, which is gone", _named(holder))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _held.discard(self._token)
        self._released.set()
        self._renewer.join(timeout=10)
        while (ours := self._read_own()) and not self._storage.swap(LEASE, ours, None):
            pass

    @property
    def storage(self) -> Storage:
        """Storage that makes changes only while the lease is held."""
        return self._storage.fenced(self._token)

    def _in_use(self, holder: dict[str, Any]) -> str:
        age = time.time() - holder["renewed"]
        return f"{self._storage.root}: in use by {_named(holder)} (lease renewed {age:.0f} s ago)"

    def _write_over(self, found: bytes | None) -> bool:
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "started": _process_started(os.getpid()),
            "renewed": time.time(),
        }
        return self._storage.swap(LEASE, found, json.dumps(content).encode())

    def _read_own(self) -> bytes | None:
        """Returns the lease; None if another driver has it, or nobody.

        The file tells, because a write that failed may have been done (an fsync, a lost reply).
        """
        found = self._storage.find(LEASE)
        holder = holder_in(found, f"{self._storage.root}/{LEASE}")
        return found if holder and holder["token"] == self._token else None

    def _renew_until_released(self) -> None:
        while not self._released.wait(self._timeout_s / 4):
            try:
                ours = self._read_own()
                if ours is None:
                    return  # this driver's next change fails
                self._write_over(ours)
            except (StageError, RunDirError, OSError) as error:  # e.g. a file server that is briefly unreachable
                logger.warning("%s: the lease could not be renewed: %s", self._storage.root, error)


class Driver(NamedTuple):
    name: str
    lives: bool


def find_driver(storage: Storage, timeout_s: float) -> Driver | None:
    """Returns the driver that holds the lease, which may be gone; None if nobody holds it."""
    holder = holder_in(storage.find(LEASE), f"{storage.root}/{LEASE}")
    return Driver(_named(holder), not _is_stale(holder, timeout_s)) if holder else None


def _is_stale(holder: dict[str, Any], timeout_s: float) -> bool:
    if holder["boot"] == _boot_id() and holder["pid"] == os.getpid():
        return holder["token"] not in _held
    if holder["boot"] == _boot_id():
        return _process_started(holder["pid"]) != holder["started"]
    return time.time() - holder["renewed"] > timeout_s


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _boot_id() -> str:
    """Identifies this boot and PID namespace; a container shares only its host's boot."""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return boot_id() + namespace


def _process_started(pid: int) -> float | None:
    """Returns a process's start time; None if it is gone or a zombie.

    Ticks since boot are preferred, because psutil's times move when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        return float(stat.read_text().rpartition(")")[2].split()[19]) if stat.exists() else process.create_time()
    except (psutil.NoSuchProcess, OSError):
        return None
