"""The spin-ray command, and its smallest recipe."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

SPIN_RAY = [sys.executable, "-m", "spin_ray"]


def micro_recipe() -> dict[str, Any]:
    """Returns the smallest whole run: one iteration of a tiny random Llama, fp32, one worker; bitwise repeatable."""
    return {
        "model": {"path": "embedded:tiny-llama", "max_length": 96},
        "data": {"train": "embedded:arithmetic-train", "max_rows": 48},
        "iterations": 1,
        "generation": {
            "sampling": {"max_tokens": 24},
            "shard_rows": 8,
            "engine": {"enforce_eager": True, "cpu_kv_cache_gib": 1, "dtype": "float32", "max_num_seqs": 4},
        },
        "objective": {"beta": 0.5},
        "train": {
            "precision": "fp32", "learning_rate": 1e-4, "epochs": 3, "global_batch_pairs": 4, "pack_length": 128,
            "checkpoint_every_steps": 4,
        },
    }  # fmt: skip


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def environment() -> dict[str, str]:
    """Returns a user's environment, without Ray's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def spin_ray(*arguments: str | Path, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SPIN_RAY, *map(str, arguments)],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
