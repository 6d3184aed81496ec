"""``train.precision: auto``: the faster precision of this machine, measured once, and kept by a run."""

import io
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from spin_ray.config.load import load_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.errors import RunDirError
from spin_ray.loop import driver
from spin_ray.loop.launch import run_spin
from spin_ray.planning.plan import Cluster, Given, print_plan
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime import precision, probes
from spin_ray.runtime.precision import faster_precision, with_precision
from tests.support.fakes import MINIMAL, config_of
from tests.support.paths import RECIPES, ROOT
from tests.support.planning_cases import SPIN

FACTS: dict[str, Any] = {"inputs": {}, "start_model": "m", "versions": {}}
CPU, GPU = ResourcesConfig(), ResourcesConfig(gpus=1)


def of(config: SpinConfig) -> str:
    return config.train.precision


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that was just booted, and which programs were run on it; they print ``says``."""
    told: dict[str, Any] = {"says": "bf16", "returncode": 0, "programs": []}

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        told["programs"].append(command[-1])
        return SimpleNamespace(returncode=told["returncode"], stdout=f"{told['says']}\n", stderr="a\nKilled")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(probes.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    return told


# Measuring


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables choose kernels of x86")
def test_a_cpu_without_instructions_for_bf16_computes_in_fp32(tmp_path: Path):
    """Emulated, a product of bf16 is many times slower."""
    program = (
        "from spin_ray.config.sections import ResourcesConfig\n"
        "from spin_ray.runtime.precision import faster_precision\n"
        "print(faster_precision(ResourcesConfig()))"
    )
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "TMPDIR": str(tmp_path)}
    environment = os.environ | limited | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert (told.stdout.strip(), told.stderr) == ("fp32", "")


@pytest.mark.parametrize("says", ["bf16", "fp32"])
def test_the_answer_is_kept_until_the_machine_boots_again(machine, says):
    machine["says"] = says
    assert [faster_precision(CPU) for _ in range(3)] == [says] * 3
    assert machine["programs"] == [precision._RACE]


@pytest.mark.parametrize(("name", "value"), [("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")])
def test_other_kernels_are_measured_anew(machine, monkeypatch, name, value):
    assert faster_precision(CPU) == "bf16"
    monkeypatch.setenv(name, value)
    machine["says"] = "fp32"
    assert faster_precision(CPU) == "fp32"


def test_other_threads_are_measured_anew(machine):
    for cpus in (1, 4, 1):
        faster_precision(ResourcesConfig(cpus=cpus))
    assert len(machine["programs"]) == 2


def test_a_cpu_that_cannot_be_measured_computes_in_fp32_and_says_why(machine, caplog):
    machine["returncode"] = -4
    assert faster_precision(CPU) == "fp32"
    assert "could not be compared (Killed); fp32 is taken" in caplog.text


def test_workers_with_a_gpu_compute_in_bf16_though_the_driver_has_none(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "_NVIDIA", tmp_path / "no card")
    machine["says"] = "fp32"
    assert faster_precision(GPU) == "bf16"
    assert machine["programs"] == []


@pytest.mark.parametrize("says", ["bf16", "fp32"])
def test_a_card_of_the_driver_says_whether_it_knows_bf16(machine, monkeypatch, tmp_path, says):
    monkeypatch.setattr(precision, "_NVIDIA", tmp_path)
    machine["says"] = says
    assert faster_precision(GPU) == says
    assert machine["programs"] == [precision._CARD]


# A run keeps it


def test_a_recipe_that_says_nothing_takes_the_faster_one(machine):
    machine["says"] = "fp32"
    assert of(with_precision(SpinConfig.model_validate(MINIMAL))) == "fp32"


def test_what_the_recipe_says_is_not_measured(machine):
    assert [of(with_precision(config_of(train={"precision": word}))) for word in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert machine["programs"] == []


@pytest.mark.parametrize(("began", "here"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_goes_on_in_the_precision_it_began_with_on_another_machine(machine, tmp_path, began, here):
    run = RunDir(Storage(tmp_path / "run"))
    run.begin(config_of(train={"precision": began}), FACTS)
    run.storage.create("sft/train_log.jsonl", b"")
    machine["says"] = here
    config = with_precision(config_of(train={"precision": "auto"}), run.begun_config())
    assert of(config) == began
    run.begin(config, FACTS)
    assert run.description()["config"]["train"]["precision"] == began


def test_another_precision_than_the_run_began_with_is_refused(tmp_path):
    run = RunDir(Storage(tmp_path / "run"))
    run.begin(config_of(train={"precision": "bf16"}), FACTS)
    run.storage.create("sft/train_log.jsonl", b"")
    with pytest.raises(RunDirError, match=r"train\.precision \(was 'bf16', now 'fp32'\)"):
        run.begin(with_precision(config_of(train={"precision": "fp32"}), run.begun_config()), FACTS)


@pytest.mark.parametrize("says", ["bf16", "fp32"])
def test_every_stage_and_run_json_get_what_the_driver_settled(machine, monkeypatch, tmp_path, says):
    """``auto`` is nowhere behind the start of a run; the engine computes as training does."""
    seen: list[SpinConfig] = []
    monkeypatch.setattr(driver, "spin", lambda run, config, start, engine: seen.append(config))
    machine["says"] = says
    config = config_of(
        model={"path": "embedded:tiny-llama", "max_length": 256},
        data={"train": "embedded:arithmetic-train", "max_rows": 4},
        train={"precision": "auto", "global_batch_pairs": 4},
        generation={"sampling": {"max_tokens": 24}},
    )
    run = run_spin(config, tmp_path / "run").run
    assert run.description()["config"]["train"]["precision"] == of(seen[0]) == says
    engine = seen[0].resolve_dtype(seen[0].generation.engine)
    assert engine.dtype == {"bf16": "bfloat16", "fp32": "float32"}[says]


# Planning


def test_a_plan_for_gpus_counts_in_bf16(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "_NVIDIA", tmp_path / "no card")

    def plan(word: str) -> str:
        config = load_config(RECIPES / "zephyr_7b.yaml", {"train.precision": word})
        out = io.StringIO()
        given = Given(rows=50_000, prompt_tokens=130, response_tokens=256)
        print_plan(config, Cluster(nodes=1, gpu="A100-80G"), given, SPIN, Console(file=out, width=200))
        return out.getvalue()

    assert plan("auto") == plan("bf16")
    assert "Total:" in plan("auto")
