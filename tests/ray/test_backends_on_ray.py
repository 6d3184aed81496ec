"""Whole runs that train with DeepSpeed, or adapters only: real stages and workers; answers are tokens by seed."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.loop.launch import run_spin
from spin_ray.run_dir.run_dir import RunDir
from tests.support.fakes import seed_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
START = Path(resolve("embedded:tiny-llama"))


def run_with(folder: Path, iterations: int = 1, **train: Any) -> RunDir:
    """12 rows, 3 steps an iteration, two workers."""
    config = SpinConfig.model_validate(
        {
            "model": {"path": str(START), "max_length": 160, "attention": "packed"},
            "data": {"train": "embedded:arithmetic-train", "max_rows": 12},
            "iterations": iterations,
            "objective": {"window": 1},
            "generation": {"sampling": {"max_tokens": 24}, "resources": {"cpus": 0.5}},
            "train": {
                "workers": 2, "resources": {"cpus": 1}, "precision": "fp32", "learning_rate": 1e-3, "epochs": 1,
                "global_batch_pairs": 4, "pack_length": 256, "checkpoint_every_steps": 2, **train,
            },
            "tracking": {"tensorboard": False},
        }
    )  # fmt: skip
    return run_spin(config, folder, seed_engine).run


def log_of(run: RunDir, iteration: int) -> list[dict[str, float]]:
    lines = run.storage.read(f"iter_{iteration:03d}/train_log.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_with_deepspeed_has_the_losses_and_weights_of_fsdp2(tmp_path: Path) -> None:
    """Step 0 has margin 0, as its reference was scored by the same workers; ZeRO-3, checkpoint after step 1."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    runs = {kind: run_with(tmp_path / kind, backend=kind) for kind in ("fsdp2", "deepspeed")}
    ours, theirs = (log_of(runs[kind], 0) for kind in ("deepspeed", "fsdp2"))
    assert ours[0]["margin"] == 0.0 and ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("loss", "grad_norm", "real_logp"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3), name
    start = weights_of(START)
    found, expected = (weights_of(runs[kind].storage.path("iter_000/model")) for kind in ("deepspeed", "fsdp2"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = (weight - start[name].float()).abs().max()
        assert moved > 0 and (found[name] - weight).abs().max() < 0.05 * moved, name


def test_a_run_with_adapters_hands_on_plain_models(tmp_path: Path) -> None:
    """Iteration 1 starts from the merged weights of iteration 0 with fresh adapters, so its margins start at 0 again;
    only linear layers ever move.
    """
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    run = run_with(tmp_path / "run", iterations=2, lora={"rank": 4})
    for iteration in (0, 1):
        assert log_of(run, iteration)[0]["margin"] == 0.0
    models = [weights_of(folder) for folder in (START, *(run.storage.path(f"iter_00{i}/model") for i in (0, 1)))]
    assert models[0].keys() == models[1].keys() == models[2].keys()
    for before, after in pairwise(models):
        for name, weight in after.items():
            moved = not torch.equal(weight.float(), before[name].float())
            assert moved == name.endswith("_proj.weight"), name
