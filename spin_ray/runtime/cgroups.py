"""Limits of this process's cgroups, as containers, Slurm and ``systemd-run`` set them.

A limit of a group holds for all groups below it, so each file is read on the way from the process's own group up.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory_limit() -> int | None:
    """Returns the least limit in bytes; None without one."""
    limits = [_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes") for folder in _folders("memory")]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def cpu_limit() -> float | None:
    """Returns the least limit in CPUs, such as 1.5; None without one."""
    return min((quota for folder in _folders("cpu") if (quota := _quota(folder))), default=None)


def _quota(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    ]  # fmt: skip
    quota, period = (int(word) if word.isdigit() else 0 for word in words)
    return quota / period if quota and period else None  # "max" (v2) and -1 (v1) are no limit


def _folders(controller: str) -> Iterator[Path]:
    """Yields the folders of this process's groups in version 2 and in version 1 of ``controller``.

    In a container the path may be that outside of it, of which only the root is there.
    """
    for line in _read(OWN).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = ROOT / controller if controllers else ROOT
        group = Path(path.lstrip("/"))
        for inside in (group, *group.parents):
            yield top / inside


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
