"""The training backend: owner of model, optimizer and schedule. Only tensors and paths leave it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.learner.batch import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """Settings of computation and optimizer. Example, scoring only: ``BackendSettings(max_length=2048)``."""

    kind: str = "fsdp2"
    """Name or import path of the backend (``train.backend``)."""
    max_length: int
    """Longest prompt + response in tokens (``model.max_length``): tells whether a sliding window can matter."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Data type of the computation and of exported weights. Master weights, gradients and optimizer state are fp32."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    sharding: Literal["full", "shard_grad_op"] = "full"
    """Gather weights for each pass of each layer, or once per optimizer step (``train.sharding``)."""
    reduce_every_pack: bool = False
    """Sum gradients over ranks with every ``backward``; the others then are collectives, too."""
    offload: bool = False
    """Keep this rank's share of weights, gradients and optimizer state in the CPU's memory (``train.offload``)."""
    lora: LoraConfig | None = None
    """Train adapters only; exports are merged."""
    seed: int = 0
    """Seed of the adapters' first values."""
    optimizer: OptimizerConfig | None = None
    """None: the backend only scores (reference, evaluation) and holds no optimizer state."""
    learning_rate: float = 0.0
    """Peak learning rate."""
    total_steps: int = 0
    """Optimizer steps of the whole schedule."""

    @classmethod
    def for_scoring(cls, config: SpinConfig) -> Self:
        """Returns the settings that every backend of a run takes from its config; one that trains has more."""
        assert config.train.precision != "auto", "settled before a run begins (runtime.precision)"
        return cls(
            max_length=config.model.max_length,
            precision=config.train.precision,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """Learning rate of this step."""


class TrainBackend(Protocol):
    """A model in training, sharded over ranks. An implementation is built of ``(model_dir, settings, device)``.

    Every method but ``backward`` of a not-last microbatch is a collective: all ranks call it, in the same order.
    Dropout is always off: a log-probability is a property of the model, and the reference must be reproducible.
    """

    layout: Literal["packed", "padded"]
    """Layout in which responses are scored, after ``attention="auto"`` was decided."""
    steps_done: int
    """Optimizer steps so far; ``load`` restores it."""

    @property
    def device(self) -> torch.device:
        """Device that batches are computed on."""
        ...

    def logps(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        """Returns log p(response | prompt) of every response in the pack, fp32, differentiable."""
        ...

    def score(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        """Returns the numbers of ``logps``, bit for bit, without a graph: for the reference and for evaluation."""
        ...

    def backward(self, loss: Float[Tensor, ""], *, last_microbatch: bool) -> None:
        """Adds the gradient of ``loss``; gradients are SUMMED over microbatches and ranks, so ``loss`` must already be
        divided by counts of the whole step. Ranks meet when ``last_microbatch``.
        """
        ...

    def step(self) -> StepStats:
        """Clips, optimises, sets the next learning rate, zeroes gradients.

        Raises:
            FloatingPointError: the gradient norm is not finite; raised on every rank, the weights are untouched.
        """
        ...

    def save(self, directory: Path) -> None:
        """Writes this rank's files of a checkpoint (weights, optimizer, progress). Ranks may be given different local
        directories; a checkpoint is the union of their files.
        """
        ...

    def load(self, directory: Path) -> None:
        """Continues from a checkpoint, bit for bit; ``directory`` holds the files of all ranks, however many."""
        ...

    def export_hf(self, directory: Path) -> None:
        """Writes a Hugging Face folder on rank 0: safetensors, config, tokenizer, template. Others return earlier."""
        ...


def set_learning_rate(param_groups: Iterable[dict[str, Any]], settings: BackendSettings, step: int) -> None:
    """Gives the optimizer the rate of the step that comes next."""
    assert settings.optimizer is not None
    for group in param_groups:
        group["lr"] = learning_rate_at(
            step,
            peak=settings.learning_rate,
            total_steps=settings.total_steps,
            warmup_fraction=settings.optimizer.warmup_fraction,
            schedule=settings.optimizer.schedule,
        )


def learning_rate_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_fraction: float,
    schedule: Literal["linear", "cosine", "constant"],
) -> float:
    """Returns the learning rate of step 0 ≤ ``step`` < ``total_steps``.

    Over the first w = round(warmup_fraction · total_steps) steps it rises as peak·(step+1)/(w+1), so no step is spent
    at 0 and step w is the first at the peak; then, with t = (step−w)/(total−w): linear 1−t, cosine (1+cos πt)/2,
    constant 1. The decays would reach 0 at step ``total_steps``, which is never taken.
    """
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]
    return peak * factor
