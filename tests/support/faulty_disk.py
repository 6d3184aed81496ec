"""A disk that fails at one point of a run, as disks and machines fail."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spin_ray.run_dir.storage import Disk

FAULTS = ("killed", "killed after the effect", "ENOSPC", "EIO", "short write", "EIO after the effect")


_disks: dict[int, "FaultyDisk"] = {}


def _disk_of(identity: int) -> "FaultyDisk":
    return _disks[identity]


class Killed(BaseException):
    """The end of the process: nothing catches it, and its disk changes no more."""


class FaultyDisk(Disk):
    """A disk that counts the points of a run, and fails once, at point ``at``.

    An fsync is a point but is not done, as a power cut cannot be made here.
    """

    def __init__(self, at: int | None = None, fault: str = "killed", die: Callable[[], None] = lambda: None) -> None:
        self.points: list[str] = []
        """Kind of change and path of each point."""
        self._at, self._fault, self._die = at, fault, die
        self._dead = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes unpickling return this very disk: work is pickled for an actor."""
        _disks[id(self)] = self
        return _disk_of, (id(self),)

    def make_folder(self, path: Path) -> None:
        if not path.is_dir():
            self._do("make_folder", path, lambda: super(FaultyDisk, self).make_folder(path))

    def write(self, path: Path, data: bytes) -> None:
        self._do("write", path, lambda: super(FaultyDisk, self).write(path, data), data)

    def append(self, path: Path, data: bytes) -> None:
        self._do("append", path, lambda: super(FaultyDisk, self).append(path, data), data)

    def sync(self, path: Path) -> None:
        self._do("sync", path, lambda: None)

    def link(self, source: Path, target: Path) -> None:
        self._do("link", target, lambda: super(FaultyDisk, self).link(source, target))

    def replace(self, source: Path, target: Path) -> None:
        self._do("replace", target, lambda: super(FaultyDisk, self).replace(source, target))

    def rename_folder(self, source: Path, target: Path) -> None:
        self._do("rename_folder", target, lambda: super(FaultyDisk, self).rename_folder(source, target))

    def remove(self, path: Path) -> None:
        self._do("remove", path, lambda: super(FaultyDisk, self).remove(path))

    def _do(self, kind: str, path: Path, change: Callable[[], None], data: bytes = b"") -> None:
        if self._dead:
            raise Killed
        self.points.append(f"{kind} {path}")
        if len(self.points) - 1 != self._at:
            change()
            return
        if self._fault.endswith("after the effect"):
            change()
        if self._fault == "short write" and data:
            with path.open("ab") as file:
                file.write(data[: len(data) // 2])
        if self._fault.startswith("killed"):
            self._dead = True
            self._die()
            raise Killed
        number = errno.ENOSPC if self._fault in ("ENOSPC", "short write") else errno.EIO
        raise OSError(number, os.strerror(number), str(path))
