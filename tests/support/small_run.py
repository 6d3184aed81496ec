"""A whole run within this process: the real driver, stages and training loop over a tiny model.

A loop stands in for Ray, and ``FakeEngine`` for vLLM. Everything that touches the run folder is real.
"""

import copy
import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
import ray.train
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs import check, prompt_rows, rendering
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.learner.backends import fsdp2
from spin_ray.learner.hf_folder import load_model
from spin_ray.loop import driver, launch, scoring
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.training import stage as training
from spin_ray.loop.stages.training import worker
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.artefact import Manifest
from spin_ray.run_dir.storage import MANIFEST, Disk, Storage
from tests.support.fakes import FakeEngine

ROWS, BAD_ROWS, HELDOUT_ROWS = 12, 2, 3
STEPS = 4


def make_inputs(folder: Path) -> SpinConfig:
    """Writes a tiny model, ``ROWS`` good rows, a malformed and a repeated one, and ``HELDOUT_ROWS``."""
    tokenizer = load_tokenizer(resolve("embedded:tiny-llama"))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, tie_word_embeddings=True, **shape)
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": f"{number} + 1 = ?", "response": str(number + 1)}) for number in range(ROWS)]
    (folder / "train.jsonl").write_text("\n".join([*rows, "{broken", rows[0]]) + "\n")
    heldout = [json.dumps({"prompt": f"{n} + 2 = ?", "response": str(n + 2)}) for n in range(HELDOUT_ROWS)]
    (folder / "heldout.jsonl").write_text("\n".join(heldout) + "\n")
    return SpinConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), "max_length": 64, "attention": "padded"},
            "data": {
                "train": str(folder / "train.jsonl"),
                "heldout": str(folder / "heldout.jsonl"),
                "max_quarantine_fraction": 0.5,
            },
            "iterations": 1,
            "generation": {"shard_rows": 6, "sampling": {"max_tokens": 8}},
            "train": {
                "precision": "fp32", "learning_rate": 1e-3, "epochs": STEPS * 6 // ROWS, "global_batch_pairs": 6,
                "pack_length": 256, "checkpoint_every_steps": 2,
            },
        }
    )  # fmt: skip


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts loops in the place of Ray Data and Ray Train."""
    ray.shutdown()  # one that another test left in this process; nothing happens without
    gc.freeze()  # closing a backend collects garbage: not among all that was imported
    monkeypatch.setattr(ray.data, "from_items", _Items)
    monkeypatch.setattr(driver, "share", lambda folder, files: None)
    monkeypatch.setattr(driver, "room_for", nullcontext)
    for module in (driver, generation, training):
        for name in ("connect", "wait_until_free"):
            monkeypatch.setattr(module, name, lambda *_: None, raising=False)
    # A third of a run's time: versions of packages, tokenizer, reading a model. Kept from one run to the next.
    monkeypatch.setattr(check, "versions", _versions)
    for module in (rendering, prompt_rows):
        monkeypatch.setattr(module, "load_tokenizer", _tokenizer)
    monkeypatch.setattr(fsdp2, "load_model", _model)
    for module in (training, scoring):
        monkeypatch.setattr(module, "run_workers", _run_worker)
    for module in (worker, scoring):
        monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))


_versions = cache(check.versions)
_tokenizer = cache(load_tokenizer)


def _model(folder: Path, *, trust_remote_code: bool) -> Any:
    weights = (Path(folder) / "model.safetensors").read_bytes()
    if weights not in _models:
        _models[weights] = load_model(folder, trust_remote_code=trust_remote_code)
    return copy.deepcopy(_models[weights])


_models: dict[bytes, Any] = {}


class _Items:
    def __init__(self, items: list[Any], **_: object) -> None:
        self._items: Iterator[Any] = iter(items)

    def map(self, function: Any, fn_constructor_args: tuple[Any, ...] = (), **_: object) -> "_Items":
        self._items = map(function(*fn_constructor_args) if isinstance(function, type) else function, self._items)
        return self

    def iter_rows(self) -> Iterator[Any]:
        return self._items


def _run_worker(
    function: Callable[[Any], Any],
    job: Any,
    config: SpinConfig,
    name: str,
    where: str,
    prepare: Callable[[], None] = lambda: None,
    **_: object,
) -> Any:
    """Runs one worker; keeps a reported checkpoint as Ray Train does, complete or not at all."""
    prepare()
    # Of a run on an object store, Ray Train would keep the checkpoints there.
    folder = object_storage.CACHE / where.replace("://", "/") if "://" in where else Path(where)
    kept = folder / name / "checkpoint"

    def report(metrics: object, checkpoint: ray.train.Checkpoint, checkpoint_upload_fn: object) -> None:
        attempt = folder / name / "attempt"
        shutil.rmtree(attempt, ignore_errors=True)
        shutil.copytree(checkpoint.path, attempt)
        shutil.rmtree(kept, ignore_errors=True)
        attempt.rename(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.train, "report", report)
        patch.setattr(
            ray.train, "get_checkpoint", lambda: ray.train.Checkpoint.from_directory(kept) if kept.exists() else None
        )
        return function(job)


def run(config: SpinConfig, out: Path | str, disk: Disk | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if disk is not None:
            patch.setattr(launch, "open_storage", lambda root: Storage(root, disk))
        launch.run_spin(config, out, start_engine=lambda spec: FakeEngine(vocabulary=60))


def committed(out: Path) -> dict[str, str]:
    """Returns digests of all manifests and the files that they list."""
    found = {}
    for manifest in out.rglob(MANIFEST):
        if ".attempts" not in manifest.parts:
            names = [MANIFEST, *Manifest.from_bytes(manifest.read_bytes()).files]
            for path in (manifest.parent / name for name in names):
                found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
