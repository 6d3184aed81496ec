"""One driver per run: a lease file that its holder renews and that others respect until it is stale."""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from spin_ray.errors import RunDirError
from spin_ray.storage import Storage

logger = logging.getLogger(__name__)

LEASE = "lease.json"


class Lease:
    """Held while a driver works on a run.

    A lease is stale when its holder is a process of this machine that is gone, or one of another machine that did not
    renew it for ``timeout_s`` seconds. A second driver that finds a lease which is not stale gets an error that names
    the holder.
    """

    def __init__(self, storage: Storage, timeout_s: float) -> None:
        self._storage = storage
        self._timeout_s = timeout_s
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._lost: str | None = None
        self._renewer = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)

    def __enter__(self) -> Self:
        with _takeover_lock(self._storage.path(".lease.lock")):
            holder = _read(self._storage)
            if holder is not None and not self._is_stale(holder):
                raise RunDirError(
                    f"{self._storage.root}: in use by process {holder['pid']} on {holder['host']} "
                    f"(lease renewed {time.time() - holder['renewed']:.0f} s ago); "
                    "wait for it, stop it, or choose another --out"
                )
            if holder is not None:
                logger.warning(
                    "taking over the lease of process %s on %s, which is gone", holder["pid"], holder["host"]
                )
            self._write()
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        self._renewer.join(timeout=10)
        if not self._lost:
            self._storage.delete(LEASE)

    def check(self) -> None:
        """Raises RunDirError if another driver took the run over (this one was paused for longer than the time-out)."""
        if self._lost:
            raise RunDirError(f"{self._storage.root}: the lease was taken over by {self._lost}; this driver stops")

    def _is_stale(self, holder: dict[str, Any]) -> bool:
        if holder["boot"] == _boot_id():
            return _process_started(holder["pid"]) != holder["started"]
        return time.time() - holder["renewed"] > self._timeout_s

    def _write(self) -> None:
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "started": _process_started(os.getpid()),
            "renewed": time.time(),
        }
        self._storage.replace(LEASE, json.dumps(content).encode())

    def _renew_until_released(self) -> None:
        while not self._released.wait(self._timeout_s / 4):
            try:
                self._renew()
            except (OSError, RunDirError) as error:  # say, a file server that is away for a moment
                logger.warning("%s: the lease could not be renewed: %s", self._storage.root, error)
            if self._lost:
                return

    def _renew(self) -> None:
        with _takeover_lock(self._storage.path(".lease.lock")):
            holder = _read(self._storage)
            if holder is None:
                self._lost = "nobody (the lease file is gone)"
            elif holder["token"] != self._token:
                self._lost = f"process {holder['pid']} on {holder['host']}"
            else:
                self._write()


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(LEASE))
    except FileNotFoundError:
        return None


def _boot_id() -> str:
    """Names this machine since it booted (a container shares it with its host, and then process numbers may not be
    seen: the start time of the process is compared too).
    """
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + namespace
    except OSError:
        return f"{socket.gethostname()}-{psutil.boot_time():.0f}"


def _process_started(pid: int) -> float | None:
    """When a process started; None if it is gone, or dead and only waiting for its parent to notice.

    In ticks since the machine booted where /proc tells: psutil's times move when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        return float(stat.read_text().rpartition(")")[2].split()[19]) if stat.exists() else process.create_time()
    except (psutil.NoSuchProcess, OSError):
        return None


class _takeover_lock:  # noqa: N801 (reads as a function where it is used)
    """Serialises reading and writing of the lease file; the kernel drops it with its process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            raise RunDirError(
                f"{self._path.parent}: cannot hold a run ({error.strerror}); choose another --out"
            ) from error

    def __exit__(self, *_: object) -> None:
        self._file.close()
