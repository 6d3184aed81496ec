"""The training backend, which owns model, optimizer and schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig, Mesh, OptimizerConfig
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.head import HeadReader


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """Settings of a backend. Fields without a docstring are those of ``TrainConfig`` and ``ModelConfig``."""

    kind: str = "fsdp2"
    """Name or import path."""
    max_length: int
    """Longest prompt + response in tokens."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of computation and exports; master weights and optimizer state are fp32."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    sharding: Literal["full", "shard_grad_op"] = "full"
    mesh: Mesh | None = None
    """None: all ranks shard one copy of the weights."""
    compile: bool | Literal["auto"] = False
    deterministic: bool = False
    reduce_every_pack: bool = False
    offload: bool = False
    lora: LoraConfig | None = None
    adapter: Path | None = None
    """Folder of an adapter, from which training starts and with which the model is scored."""
    base: Literal["bf16", "nf4", "int8"] = "bf16"
    """Format of frozen weights; ``bf16`` means ``precision``."""
    base_name: str = ""
    """Name of the base model in exported adapters."""
    seed: int = 0
    """Seed of the adapters' first values."""
    optimizer: OptimizerConfig | None = None
    """None: the backend only scores."""
    learning_rate: float = 0.0
    total_steps: int = 0
    """Optimizer steps of the schedule."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of ``precision``."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @classmethod
    def for_scoring(cls, config: SpinConfig) -> Self:
        """Returns the settings that scoring and training share."""
        assert config.train.precision != "auto", "settled before a run begins (runtime.precision)"
        return cls(
            max_length=config.model.max_length,
            precision=config.train.precision,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
            base=config.train.lora.base if config.train.lora else "bf16",
            # DeepSpeed trains uncompiled, and compiled scores of the same weights round otherwise.
            compile=False if config.train.backend == "deepspeed" else config.train.compile,
            deterministic=config.train.deterministic,
            offload=config.train.offload,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    grad_norm: float
    """Norm before clipping."""
    learning_rate: float


class TrainBackend(Protocol):
    """A sharded model in training, built from ``(model_dir, settings, device)``.

    Every method is a collective; ``backward`` may be local before the last microbatch.
    Dropout is always off, for a reproducible reference.
    """

    @property
    def device(self) -> torch.device: ...

    def logps(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        """Returns log p(response | prompt), fp32, differentiable."""
        ...

    def score(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        """Returns the same bits as ``logps``, without a graph."""
        ...

    def read(self, batch: PackedBatch, reader: HeadReader) -> Any:
        """Returns what ``reader`` makes of head and hidden states, differentiable; only SDFT calls it."""
        ...

    def backward(self, loss: Float[Tensor, ""], *, last_microbatch: bool) -> None:
        """Adds the gradient of ``loss``, SUMMED over microbatches and ranks.

        The caller divides ``loss`` by counts of the whole step.
        """
        ...

    def step(self) -> StepStats:
        """Clips, optimises, sets the next learning rate, zeroes gradients.

        Raises:
            FloatingPointError: the gradient norm is not finite; raised on every rank, weights untouched.
        """
        ...

    def save(self, directory: Path) -> None:
        """Writes this rank's files of a checkpoint; ranks may have different directories."""
        ...

    def load(self, directory: Path) -> None:
        """Restores a checkpoint bit for bit; ``directory`` holds the files of all ranks."""
        ...

    def export_hf(self, directory: Path) -> None:
        """Writes a Hugging Face folder on rank 0; other ranks return earlier."""
        ...


def set_learning_rate(param_groups: Iterable[dict[str, Any]], settings: BackendSettings, step: int) -> None:
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
    """Returns the learning rate of step 0 ≤ ``step`` < ``total_steps``, never 0.

    The first w = round(warmup_fraction·total_steps) steps have peak·(step+1)/(w+1).
    Then, with t = (step−w)/(total_steps−w), the factor is 1−t (linear), (1+cos πt)/2 (cosine) or 1.
    """
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]
    return peak * factor
