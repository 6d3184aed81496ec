"""What the tests run on the null card, each in a process of its own: ``python -m tests.null_card.programs NAME …``."""

import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.learner import metrics
from spin_ray.learner.attention import flex, varlen
from spin_ray.learner.backends import fsdp2
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.layout_probe import Probe
from spin_ray.learner.step import Objective, PackShape, ReferenceScores, train_step
from spin_ray.planning.learner_cost import learner_memory
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import RUNTIME
from spin_ray.planning.work import Packs
from tests.support.learner_cases import (
    PACK_LENGTH,
    batches_of,
    one_rank,
    one_step,
    random_rows,
    save_model,
    table_of,
    tiny_llama,
)

ROWS = random_rows(seed=0, trees=24)
CARD = torch.device("cuda")
CUBLAS = 2**25
"""Bytes that cuBLAS keeps."""
ADAPTER = LoraConfig(rank=4, merge=False)
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {"compile": "auto"},
    "fp32": {"precision": "fp32"},
    "checkpointing": {"compile": True, "gradient_checkpointing": True},
    "deterministic": {"compile": True, "deterministic": True},
    "reduced every pack": {"compile": True, "reduce_every_pack": True},
    "adapters": {"compile": True, "lora": ADAPTER},
    "nf4": {"compile": True, "lora": ADAPTER.model_copy(update={"base": "nf4"}), "base": "nf4"},
    "muon": {"lora": ADAPTER, "name": "muon"},
    "adamw_8bit": {"name": "adamw_8bit"},
}


def kernels(*widths: str) -> None:
    """Compiles FlexAttention's kernels, forward and backward, for heads of these widths, and calls ``varlen_attn``."""
    batch = batches_of(ROWS, pack_length=512)[0]
    for width in map(int, widths):
        for kv_heads, softcap, has_sinks in ((2, None, False), (4, 20.0, False), (2, None, True)):
            torch._dynamo.reset()
            sizes = (4, kv_heads, kv_heads)
            states = [_values(1, heads, len(batch.tree), width) for heads in sizes]
            sinks = _values(4) if has_sinks else None
            plan = flex.Flex().prepare(batch, [None], CARD, torch.bfloat16)
            plan.attend(*states, scaling=None, window=None, softcap=softcap, sinks=sinks).sum().backward()
            if softcap is None and sinks is None and width <= 256:  # the widest heads of flash attention
                plan = varlen.Varlen().prepare(batch, [None], CARD, torch.bfloat16)
                plan.attend(*states, scaling=None, window=None, softcap=None, sinks=None).sum().backward()


def learns(name: str) -> None:
    """Scores, takes two steps, saves, loads and exports."""
    backend = _backend(**SETTINGS[name])
    assert backend._scorer.layout == "packed"
    for batch in batches_of(ROWS):
        backend.score(batch)
    _step(backend)
    _step(backend)
    folder = Path(tempfile.mkdtemp())
    backend.save(folder)
    backend.load(folder)
    backend.export_hf(Path(tempfile.mkdtemp()))
    backend.close()


def waits(name: str) -> None:
    """Prints how often a step waits for the device."""
    backend = _backend(**SETTINGS[name])
    _step(backend)
    _step(backend)
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            ours = [frame for frame in traceback.extract_stack() if "/spin_ray/" in frame.filename]
            found[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "torch"] += 1

    warnings.showwarning = note  # type: ignore[assignment]
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    _step(backend)
    torch.cuda.set_sync_debug_mode("default")
    print(found.total(), dict(found))


def frees(name: str) -> None:
    """Prints the bytes that a closed backend leaves behind, beyond those of one that came before."""
    left = []
    for _ in range(2):
        backend = _backend(**SETTINGS[name])
        _step(backend)
        backend.close()
        left.append(torch.cuda.memory_allocated())
    print(left[1] - left[0], left[0] - CUBLAS)


def memory(name: str) -> None:
    """Prints the plan's bytes over the peak of a step, for 150M parameters."""
    length, (prompt, response) = 4096, (96, 64)
    trees = 2 * (length // (prompt + 2 * response))
    rows = [([10 + tree] * prompt, [4] * response, [5] * response) for tree in range(trees)]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    folder = save_model(Path(tempfile.mkdtemp()) / "model", LlamaForCausalLM(config).bfloat16())
    settings = {"compile": True} | SETTINGS[name]
    of_plan = {key: settings[key] for key in ("gradient_checkpointing", "reduce_every_pack") if key in settings}
    recipe = SpinConfig.model_validate(
        {
            "model": {"path": str(folder), "max_length": 256},
            "data": {"train": "-"},
            "generation": {"sampling": {"max_tokens": 64}},
        }
        | {"train": {"pack_length": length, "precision": "bf16", "lora": settings.get("lora")} | of_plan}
    )
    optimizer = recipe.train.optimizer
    given = BackendSettings(max_length=256, learning_rate=1e-6, total_steps=9, optimizer=optimizer, **settings)
    backend = Fsdp2Backend(folder, given, CARD)
    torch.cuda.reset_peak_memory_stats()
    packs = len(one_step(rows, pack_length=length).packs)
    _step(backend, rows, length)
    _step(backend, rows, length)
    targets = 2 * response * len(rows) // packs
    work = Packs(
        steps=1, per_step=packs, per_rank=packs, length=length, targets=targets, per_rank_at_most=packs, tokens=0
    )
    shape = ModelShape.from_folder(folder)
    parts = learner_memory(recipe, shape, work, optimizer=optimizer, backward=True)
    print((sum(parts.values()) - RUNTIME) / (torch.cuda.max_memory_allocated() - CUBLAS))


def falls_back(_: str) -> None:
    """Prints the attention that is taken for wide heads where torch's own tiles are used."""
    flex.kernel_options = lambda query: {"FORCE_USE_FLEX_ATTENTION": True}
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=128,
    )  # fmt: skip
    print(_backend(model=LlamaForCausalLM(config))._scorer._attention.name)


def _values(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=CARD, dtype=torch.bfloat16, requires_grad=True)


def _backend(model: Any = None, name: str = "adamw", **settings: Any) -> Fsdp2Backend:
    folder = save_model(Path(tempfile.mkdtemp()) / "model", model or tiny_llama(hidden=64))
    optimizer = OptimizerConfig(name=name, schedule="constant", warmup_fraction=0)
    given = BackendSettings(max_length=48, learning_rate=1e-3, total_steps=100, optimizer=optimizer, **settings)
    return Fsdp2Backend(folder, given, CARD)


def _step(backend: Fsdp2Backend, rows: Any = ROWS, length: int = PACK_LENGTH) -> None:
    zeros = torch.zeros(len(rows), device=CARD)
    shape = PackShape(pack_length=length, global_batch_pairs=len(rows), pad_id=0)
    step, reference = one_step(rows, pack_length=length), ReferenceScores(real=zeros, generated=zeros)
    train_step(backend, step, table_of(rows), shape, Objective(loss="logistic", beta=0.1), reference)


def _pass_what_computes_nothing() -> None:
    """Keeps, of the probe's findings, those that something failed to run, and takes every number for finite."""
    differs = Probe._differs

    def failed(self: Probe, *arguments: Any) -> str | None:
        reason = differs(self, *arguments)
        return None if reason and "differ from those" in reason else reason

    Probe.looks_ahead, Probe._differs = lambda self: None, failed  # type: ignore[method-assign]
    fsdp2.math = metrics.math = SimpleNamespace(isfinite=lambda value: True)  # type: ignore[assignment]


if __name__ == "__main__":
    _pass_what_computes_nothing()
    with one_rank(Path(tempfile.mkdtemp()), "cpu:gloo,cuda:nccl"):
        programs = {each.__name__: each for each in (kernels, learns, waits, frees, memory, falls_back)}
        programs[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # CUDA's own end expects a driver
