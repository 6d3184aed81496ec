"""A probe with the real vLLM and the real training loop: on people's small talk, and on the model's own samples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import check_recipe
from spin_ray.loop import launch, probe
from spin_ray.loop.driver import _engine_spec, _player
from spin_ray.loop.stages.generation.stage import row_seed
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PROMPT_SCHEMA
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.engine import VllmEngine
from tests.support import small_run
from tests.support.fakes import write_rows

pytestmark = pytest.mark.e2e

CONFIG = SpinConfig.model_validate(
    {
        "model": {"path": "embedded:tiny-llama", "max_length": 256},
        "data": {"train": "embedded:chitchat-train", "max_rows": 96, "system": "", "max_quarantine_fraction": 1},
        "generation": {
            "sampling": {"max_tokens": 24},
            "engine": {"enforce_eager": True, "cpu_kv_cache_gib": 1, "dtype": "float32", "max_num_seqs": 64},
        },
        "objective": {"beta": 0.5},
        "train": {"precision": "fp32", "learning_rate": 1e-4, "pack_length": 512, "global_batch_pairs": 8},
        "probe": {"prompts": 96, "global_batch_pairs": 8},
    }
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """An engine in this process, which takes the process group of the one train worker."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    start = check_recipe(CONFIG)
    started = VllmEngine(_engine_spec(CONFIG, start, start.model))
    yield started
    started.close()  # ends the process group, too


def test_small_talk_has_something_to_teach_and_the_models_own_samples_have_not(tmp_path, monkeypatch, engine) -> None:
    small_run.in_this_process(monkeypatch)
    found = launch.probe_spin(CONFIG, tmp_path / "talk", start_engine=lambda spec: engine)
    assert found["something_to_learn"]
    assert found["evidence"]["ngrams"]["low"] > 0.9
    assert found["evidence"]["sft_gain"] > 0

    # Other processors draw other samples, and one set in twenty looks unlike by chance.
    tries = (_probe_of_own_samples(tmp_path, tmp_path / f"own-{seed}", seed, engine) for seed in (2, 3))
    assert not all(found["something_to_learn"] for found in tries)


def _probe_of_own_samples(tmp_path: Path, folder: Path, seed: int, engine: VllmEngine) -> dict[str, Any]:
    talk, run = RunDir(Storage(tmp_path / "talk")), RunDir(Storage(folder))
    rows = [row for table in talk.prompts.tables() for row in table.to_pylist()]
    seeds = [row_seed(seed, "a teacher", row["prompt_id"], 0) for row in rows]
    said = engine.generate([row["prompt_ids"] for row in rows], CONFIG.generation.sampling, seeds)
    taught = [row | {"real_ids": completion.token_ids} for row, completion in zip(rows, said, strict=True)]
    write_rows(run.prompts, PROMPT_SCHEMA, taught, 96)
    start = check_recipe(CONFIG)
    found = probe.run(run, CONFIG, start.model, _player(run, start, lambda spec: engine))
    assert (folder / "probe.json").exists()
    return found
