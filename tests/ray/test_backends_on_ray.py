"""Whole runs with DeepSpeed, on a tensor mesh, or of adapters: real stages and workers; answers are tokens by seed."""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.learner import step as loop
from spin_ray.loop.launch import run_spin
from spin_ray.loop.stages.training import stage as training
from spin_ray.loop.stages.training import worker
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.run_dir.run_dir import RunDir
from tests.support.fakes import seed_engine
from tests.support.heard_of import wait_until_heard_of

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
START = Path(resolve("embedded:tiny-llama"))


def run_with(folder: Path, iterations: int = 1, **train: Any) -> RunDir:
    """12 rows, 3 steps an iteration, two workers."""
    return run_spin(config_of(iterations, **train), folder, seed_engine).run


def config_of(iterations: int = 1, **train: Any) -> SpinConfig:
    return SpinConfig.model_validate(
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


def train_on_pairs_of(begun: RunDir, folder: Path, iterations: int = 1, **train: Any) -> RunDir:
    """Does a run whose recipe differs from that of ``begun`` in training alone, from the pairs of ``begun`` on."""
    for name in ("prompts", "iter_000/generations", "iter_000/pairs"):
        shutil.copytree(begun.storage.path(name), folder / name)
    told = begun.description() | {"config": config_of(iterations, **train).settle_sizes().model_dump(mode="json")}
    (folder / "run.json").write_text(json.dumps(told))
    return run_with(folder, iterations, **train)


def log_of(run: RunDir, iteration: int) -> list[dict[str, float]]:
    lines = run.storage.read(f"iter_{iteration:03d}/train_log.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], RunDir]:
    """Makes a run of FSDP2 without a mesh, once; not before the test has a Ray."""
    return cache(lambda: run_with(tmp_path_factory.mktemp("plain") / "run"))


def assert_same_training(run: RunDir, plain: RunDir) -> None:
    """Step 0 has margin 0, as its reference was scored by the same workers."""
    ours, theirs = (log_of(each, 0) for each in (run, plain))
    assert ours[0]["margin"] == 0.0 and ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("loss", "grad_norm", "real_logp"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3), name
    start = weights_of(START)
    found, expected = (weights_of(each.storage.path("iter_000/model")) for each in (run, plain))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = (weight - start[name].float()).abs().max()
        assert moved > 0 and (found[name] - weight).abs().max() < 0.05 * moved, name


def test_a_run_with_deepspeed_has_the_losses_and_weights_of_fsdp2(tmp_path: Path, plain: Callable[[], RunDir]) -> None:
    """ZeRO-3, checkpoint after step 1."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    assert_same_training(train_on_pairs_of(plain(), tmp_path / "run", backend="deepspeed"), plain())


def _killed_once(attempts: Path, job: TrainJob) -> Any:
    """The real work, but for rank 1, which dies before its third step when it first comes there."""
    right_step, mark = loop.train_step, attempts / "killed"

    def step(backend: Any, *rest: Any) -> dict[str, float]:
        if dist.get_rank() == 1 and backend.steps_done == 2 and not mark.exists():
            wait_until_heard_of(Path(job.storage.where(f"{job.name}/checkpoints")), 2)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return right_step(backend, *rest)

    worker.train_step = step
    return worker.work(job)


def test_a_tensor_group_that_loses_a_rank_goes_on_and_ends_as_plain_workers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Callable[[], RunDir]
) -> None:
    """Both ranks compute each pack; the reference has one part, and not one a rank."""
    plain()
    monkeypatch.setattr(training, "work", partial(_killed_once, tmp_path))
    run = train_on_pairs_of(plain(), tmp_path / "run", mesh={"tensor": 2}, max_failures=1)
    assert (tmp_path / "killed").exists()
    assert_same_training(run, plain())
    (commit,) = (event for event in run.events() if event["event"] == "commit" and event["kind"] == "training")
    assert commit["steps"] == 3
    assert not [event for event in run.events() if event["event"] == "lost"], "those before are in the checkpoint"
    assert commit["mesh"] == "{replicate: 1, shard: 1, tensor: 2}: the recipe says so"
    assert len(run.reference(0).manifest().files) == 1


def test_what_workers_warn_of_is_told_by_the_driver_and_kept_as_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BLOOM has no packed layout; it is loaded for the reference and the training, then three times for scoring."""
    start, folder = tmp_path / "bloom", tmp_path / "run"
    shutil.copytree(START, start, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = json.loads((START / "config.json").read_text())
    settings = {name: sizes[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **settings)).save_pretrained(start)
    changes = {
        "model": {"path": str(start), "max_length": 160},
        "data": {"train": "embedded:arithmetic-train", "heldout": "embedded:arithmetic-heldout", "max_rows": 12},
        "evaluation": {"max_rows": 4},
    }
    run = run_spin(SpinConfig.model_validate(config_of().model_dump() | changes), folder, seed_engine).run
    found = [(event["stage"], event["text"]) for event in run.events() if event["event"] == "warning" and event["kind"]]
    assert [stage for stage, _ in found] == ["iter_000/training", "iter_000/evaluation"]
    for stage, text in found:
        assert text.startswith("BloomForCausalLM: packed (") and text.endswith("costs 2-4 times as much")
        assert f"{stage}: {text}" in caplog.text
    (commit,) = (event for event in run.events() if event["event"] == "commit" and event["kind"] == "training")
    assert commit["recomputed"] is False


def test_a_run_with_adapters_hands_on_plain_models(tmp_path: Path, plain: Callable[[], RunDir]) -> None:
    """Iteration 1 starts from the merged weights of iteration 0 with fresh adapters, so its margins start at 0 again;
    only linear layers ever move.
    """
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    run = train_on_pairs_of(plain(), tmp_path / "run", iterations=2, lora={"rank": 4})
    for iteration in (0, 1):
        assert log_of(run, iteration)[0]["margin"] == 0.0
    models = [weights_of(folder) for folder in (START, *(run.storage.path(f"iter_00{i}/model") for i in (0, 1)))]
    assert models[0].keys() == models[1].keys() == models[2].keys()
    for before, after in pairwise(models):
        for name, weight in after.items():
            moved = not torch.equal(weight.float(), before[name].float())
            assert moved == name.endswith("_proj.weight"), name
