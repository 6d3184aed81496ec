"""The protocol of attention within packs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from spin_ray.learner.batch import PackedBatch

Window = int | None
"""Positions that a query sees, its own included; None: all."""


class AttentionPlan(Protocol):
    """One pack, prepared for attention in all layers."""

    @property
    def mask(self) -> Float[Tensor, "1 1 tokens tokens"] | None:
        """Returns the mask for layers that do not pass the plan on; None if it would be too large."""
        ...

    def attend(
        self,
        query: Float[Tensor, "1 heads tokens width"],
        key: Float[Tensor, "1 kv_heads tokens width"],
        value: Float[Tensor, "1 kv_heads tokens width"],
        *,
        scaling: float | None,
        window: Window,
        softcap: float | None,
        sinks: Float[Tensor, "heads"] | None,
    ) -> Float[Tensor, "1 tokens heads width"]:
        """Returns softmax(cap(QKᵀ · scaling) where seen)V, cap(s) = softcap · tanh(s / softcap).

        A sink is a further logit of the softmax, without a value.

        Raises:
            NotImplementedError: the implementation lacks a feature.
        """
        ...


class Attention(Protocol):
    """One implementation of attention within packs."""

    name: str

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why the implementation cannot run, or None."""
        ...

    def prepare(
        self, batch: PackedBatch, windows: Sequence[Window], device: torch.device, dtype: torch.dtype
    ) -> AttentionPlan:
        """Prepares a pack for all windows of the model; waits for no device."""
        ...


def effective_windows(batch: PackedBatch, windows: Sequence[Window]) -> dict[Window, Window]:
    """Maps each window to itself, or to None if no sequence of the pack is longer."""
    responses: dict[int, int] = {}
    longest = 1
    for run in batch.runs:
        if run.tree >= 0:
            length = run.stop - run.start
            if run.branch == 0:
                responses[run.tree] = length
            longest = max(longest, length + (responses[run.tree] if run.branch else 0))
    return {window: window if window is not None and window < longest else None for window in {None, *windows}}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor; does not wait for a copy to a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
