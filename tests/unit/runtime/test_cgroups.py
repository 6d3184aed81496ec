"""CPUs and memory of a process whose cgroup, or one above it, has a limit."""

import os
from pathlib import Path

import pytest

from spin_ray.loop.init.look import find_machines
from spin_ray.runtime import cgroups, cpu, gpu_memory
from tests.support.fakes import config_of

GIB = 2**30
V1 = "4:memory:/slurm/job\n3:cpu,cpuacct:/slurm/job\n0::/"


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ("0::/slurm/job/step", {"slurm/job/memory.max": f"{GIB}", "slurm/job/step/memory.max": "max"}, None, GIB),
        ("0::/a/b", {"memory.max": f"{GIB}", "a/memory.max": f"{2 * GIB}", "a/b/cpu.max": "150000 100000"}, 1.5, GIB),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "800000 100000"}, 2, None),
        ("0::/elsewhere/of/the/host", {"memory.max": f"{GIB}", "cpu.max": "50000 100000"}, 0.5, GIB),
        (V1, {"memory/slurm/memory.limit_in_bytes": f"{GIB}"}, None, GIB),
        (V1, {"cpu/slurm/job/cpu.cfs_quota_us": "300000", "cpu/slurm/job/cpu.cfs_period_us": "100000"}, 3, None),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        ("", {}, None, None),
    ],
)
def test_the_least_limit_on_the_way_up_counts(tmp_path: Path, monkeypatch, own, files, cpus, memory) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    assert (cgroups.cpu_limit(), cgroups.memory_limit()) == (cpus, memory)


@pytest.mark.parametrize(("allowed", "limit", "usable"), [(64, None, 64), (8, None, 8), (8, 2.5, 2), (64, 0.5, 1)])
def test_init_plans_with_the_cpus_that_this_process_may_use(monkeypatch, allowed, limit, usable) -> None:
    """As under ``taskset``, in a cpuset, or with a quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(cpu, "cpu_limit", lambda: limit)
    assert find_machines("none", None, 1).cpus == usable


def test_the_memory_of_this_machine_is_that_of_a_nested_cgroup(monkeypatch) -> None:
    whole = gpu_memory.memory_here(config_of())
    monkeypatch.setattr(gpu_memory, "memory_limit", lambda: 2**20)
    assert whole and whole > 2**20 and gpu_memory.memory_here(config_of()) == 2**20
