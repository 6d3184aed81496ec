"""The metrics of an optimizer step."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from spin_ray.learner.backends.base import StepStats
from spin_ray.learner.losses import Loss
from spin_ray.learner.packing import Step

MEANS = {
    "margin": "margin",
    "correct": "accuracy",
    "generated_logp": "generated_logp",
    "real_logp_drift": "real_logp_drift",
    "real_logp": "real_logp",
}
"""Names of sums, with the metrics that are their means over pairs."""
SUMMED = ("loss", *MEANS, "tokens")


def guarded(loss: Tensor, values: dict[str, Tensor | int]) -> Tensor:
    """Returns the loss; its gradients are NaN on every rank if the loss or a value is not finite.

    So a backend, which must look at the gradients' norm, refuses the step, and nobody waits for the device before.
    """
    seen = sum((value for value in values.values() if isinstance(value, Tensor)), loss).detach()
    return loss * (1 + 0 * seen).to(loss.dtype)


class StepSums:
    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)
        self._added: set[str] = set()
        on_card = device.type == "cuda"
        self._sent = torch.empty_like(self._sums, device="cpu", pin_memory=on_card)
        self._is_there = torch.cuda.Event() if on_card else None

    def add(self, values: dict[str, Tensor | int]) -> None:
        """Adds one pack's values; all packs have the same names."""
        for name, value in values.items():
            self._sums[SUMMED.index(name)] += value
        self._added |= values.keys()

    def send(self, tensor: int = 1) -> None:
        """Adds up over all ranks and copies the sums to the CPU without waiting; a collective.

        Args:
            tensor: number of ranks that computed each pack together.
        """
        dist.all_reduce(self._sums)
        self._sent.copy_(self._sums / tensor, non_blocking=True)
        if self._is_there is not None:
            self._is_there.record()

    def read(self) -> dict[str, float]:
        """Returns the sums over all packs that ``send`` sent; after the step's norm is known they are there.

        Raises:
            FloatingPointError: a sum is not finite; raised on every rank.
        """
        if self._is_there is not None:
            self._is_there.synchronize()
        values = self._sent.tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError("the loss or a log-probability is not finite; lower the learning rate or beta")
        sums = zip(SUMMED, values, strict=True)
        return {name: value for name, value in sums if name in self._added}


def step_metrics(sums: dict[str, float], step: Step, loss: Loss, stats: StepStats) -> dict[str, float]:
    """Returns means over pairs; a loss may be a mean over response tokens."""
    return {
        "loss": sums["loss"] / (step.num_pairs if loss.per == "pair" else step.num_real_tokens),
        **{metric: sums[name] / step.num_pairs for name, metric in MEANS.items() if name in sums},
        "grad_norm": stats.grad_norm,
        "lr": stats.learning_rate,
        "tokens": int(sums["tokens"]),
    }
