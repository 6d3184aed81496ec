"""CPU compute in a process: threads that Ray gave it, and no broken AMX."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spin_ray.runtime import cpu


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that advertises AMX; its probes are recorded, and end as ``returncode`` says."""
    told: dict[str, Any] = {"advertised": True, "returncode": 0, "probes": []}

    def probe(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        told["probes"].append((command, env))
        return SimpleNamespace(returncode=told["returncode"])

    monkeypatch.setattr(cpu, "_amx_is_advertised", lambda: told["advertised"])
    monkeypatch.setattr(subprocess, "run", probe)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return told


def test_ray_knows_better_than_the_environment_how_many_threads_there_are(machine):
    """A worker inherits its driver's environment."""
    os.environ["OMP_NUM_THREADS"] = "64"
    cpu.prepare(3)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_amx_that_works_is_left_alone(machine):
    cpu.prepare(1)
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert machine["probes"][0][0][0] == sys.executable


@pytest.mark.parametrize("returncode", [-4, 1])
def test_amx_that_kills_a_process_is_not_used(machine, returncode, caplog):
    """SIGILL is 4."""
    machine["returncode"] = returncode
    cpu.prepare(1)
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_FP16"
    assert "advertises AMX but cannot run it" in caplog.text


@pytest.mark.parametrize("returncode", [0, -4])
def test_the_probe_runs_once_per_machine_and_boot(machine, returncode):
    machine["returncode"] = returncode
    for _ in range(3):
        os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
        cpu.prepare(1)
    assert len(machine["probes"]) == 1
    assert ("ONEDNN_MAX_CPU_ISA" in os.environ) is (returncode != 0)


def test_a_machine_without_amx_is_not_probed(machine):
    machine["advertised"] = False
    cpu.prepare(1)
    assert machine["probes"] == []
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_who_set_the_instruction_set_is_obeyed_unprobed(machine):
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    cpu.prepare(1)
    assert machine["probes"] == []
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_the_probe_is_a_program_that_computes_in_bf16():
    compile(cpu._PROBE, "probe", "exec")
    assert "bfloat16" in cpu._PROBE and "a @ a" in cpu._PROBE


def test_amx_is_advertised_by_the_flags_of_the_processor():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert cpu._amx_is_advertised() is ("amx_tile" in flags)


def test_a_process_that_trains_gets_an_allocator_that_exists():
    """Ray's wheel has it; the loader would only warn of one that is not there."""
    environment = cpu.keep_freed_memory()
    assert Path(environment["LD_PRELOAD"]).is_file()
    told = subprocess.run(
        [sys.executable, "-c", "print('jemalloc' in open('/proc/self/maps').read())"],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (told.stdout.strip(), told.stderr) == ("True", "")


def test_without_ray_s_allocator_glibc_keeps_what_is_freed(monkeypatch):
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda _: None)
    assert "LD_PRELOAD" not in cpu.keep_freed_memory()
    assert cpu.keep_freed_memory()["MALLOC_TRIM_THRESHOLD_"] == str(2**40)


def test_kernels_compiled_for_a_limit_are_kept_apart(machine, tmp_path):
    """As torch 2.13 mixes them up; a folder that the user names is the user's."""
    cpu.prepare(1)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    cpu.prepare(1)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/torchinductor_{os.getuid()}_avx2"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/mine"
    cpu.prepare(1)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
