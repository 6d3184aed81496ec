"""Run folders with a few tiny iterates that were never trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import check_recipe
from spin_ray.run_dir.artefact import Manifest, folder_entries
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import MANIFEST, Storage


def tiny_config(train: dict[str, Any] | None = None, model: str = "embedded:tiny-llama", **serving: Any) -> SpinConfig:
    return SpinConfig.model_validate(
        {
            "model": {"path": model, "max_length": 256},
            "data": {"train": "embedded:arithmetic-train", "max_rows": 8},
            "train": train or {"global_batch_pairs": 8},
            "iterations": 4,
            "generation": {
                "sampling": {"max_tokens": 24},
                "engine": {"enforce_eager": True, "cpu_kv_cache_gib": 1, "dtype": "float32", "max_num_seqs": 16},
            },
            "objective": {"beta": 0.5},
            "serving": {"follow_interval_s": 0.2, "drain_grace_s": 0.5, "retry_failed_s": 1, **serving},
        }
    )


def make_run(folder: Path, iterates: int, **serving: Any) -> RunDir:
    config = tiny_config(**serving)
    start = check_recipe(config)
    run = RunDir(Storage(folder))
    run.begin(config, start.facts())
    run.publish(0)
    for iterate in range(1, iterates + 1):
        add_iterate(run, iterate)
        run.publish(iterate)
    return run


def make_adapter_run(folder: Path, iterates: int, **settings: Any) -> RunDir:
    """Makes a run of rank-4 adapters that change every answer."""
    lora = {"rank": 4, "alpha": 8, "merge": False}
    run = make_run(folder, 0, train={"global_batch_pairs": 8, "lora": lora}, **settings)
    for iterate in range(1, iterates + 1):
        add_adapter(run, iterate, seed=iterate)
        run.publish(iterate)
    return run


def add_adapter(run: RunDir, iterate: int, seed: int) -> None:
    peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
    start = AutoModelForCausalLM.from_pretrained(run.description()["start_model"])
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model, noise = peft.get_peft_model(start, lora), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.2, generator=noise)
    attempt = run.storage.new_attempt_folder()
    model.save_pretrained(attempt)
    (attempt / "README.md").unlink()
    (attempt / MANIFEST).write_bytes(Manifest.of(folder_entries(attempt), {}, {}).to_bytes())
    run.storage.create_folder(run.adapter(iterate).path, attempt)


def add_iterate(run: RunDir, iterate: int, loads: bool = True, seed: int | None = None) -> None:
    """Commits θ_iterate: the start model plus noise, with its own answers and digest.

    With ``loads=False`` a weight lacks a row; it is committed like any other.
    """
    attempt = run.storage.new_attempt_folder()
    shutil.copytree(run.description()["start_model"], attempt, dirs_exist_ok=True)
    weights = load_file(attempt / "model.safetensors")
    noise = torch.Generator().manual_seed(iterate if seed is None else seed)
    moved = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=noise).to(weight.dtype)
        for name, weight in weights.items()
    }
    if not loads:
        moved["model.norm.weight"] = moved["model.norm.weight"][:-1].clone()
    save_file(moved, attempt / "model.safetensors", metadata={"format": "pt"})
    manifest = Manifest.of(folder_entries(attempt), {}, {})
    (attempt / MANIFEST).write_bytes(manifest.to_bytes())
    run.storage.create_folder(run.model(iterate).path, attempt)
