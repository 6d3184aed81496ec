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


class StepSums:
    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)
        self._added: set[str] = set()

    def add(self, values: dict[str, Tensor | int]) -> None:
        """Adds one pack's values; all packs have the same names."""
        for name, value in values.items():
            self._sums[SUMMED.index(name)] += value
        self._added |= values.keys()

    def reduce(self, tensor: int = 1) -> dict[str, float]:
        """Returns the sums over all packs; a collective.

        Args:
            tensor: number of ranks that computed each pack together.

        Raises:
            FloatingPointError: a sum is not finite; raised on every rank.
        """
        dist.all_reduce(self._sums)
        values = (self._sums / tensor).tolist()  # one wait for the device
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
