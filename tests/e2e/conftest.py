"""Whole runs with the real parts, in processes of their own as a user starts them."""

from pathlib import Path

import pytest
import yaml

from tests.support.program import ROOT, spin_ray, write_recipe


@pytest.fixture(scope="session")
def smollm2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of SmolLM2-135M on a few conversations by two FSDP2 workers, with held-out rows."""
    folder = tmp_path_factory.mktemp("smollm2")
    recipe = yaml.safe_load((ROOT / "jobs" / "recipes" / "demo.yaml").read_text())
    recipe["data"] |= {"max_rows": 16, "prompts_per_iteration": 8}
    recipe["evaluation"] = {"max_rows": 8}
    recipe["generation"] |= {"shard_rows": 8, "sampling": {"max_tokens": 24}}
    recipe["train"] |= {"precision": "auto", "global_batch_pairs": 4, "pack_length": 256}
    del recipe["sft"]
    out = folder / "run"
    finished = spin_ray("run", write_recipe(folder, recipe), "--out", out, timeout_s=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out
