"""Limits at which training stops by itself."""

from collections import deque
from typing import Any

import numpy as np

from spin_ray.config.sections import HealthConfig
from spin_ray.errors import HealthError


class HealthMonitor:
    """A monitor of means over the last steps, equal on all ranks."""

    def __init__(self, limits: HealthConfig, steps: int) -> None:
        """Takes the number of steps of the whole training, which may be fewer than ``limits.steps``."""
        self._limits = limits
        self._over = min(limits.steps, steps)
        self._recent: deque[dict[str, Any]] = deque(maxlen=self._over)

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Checks the last steps' means, except in SFT; each limit where its measure exists (SDFT: the loss alone).

        Raises:
            HealthError: a limit is passed.
        """
        compares = bool({"margin", "generated_logp"} & metrics.keys())
        if "real_logp" in metrics and not compares:
            return
        self._recent.append(metrics)
        if len(self._recent) < self._over:
            return
        for name, value, limit, meaning in [
            ("max_loss", self._mean("loss"), self._limits.max_loss, "the loss"),
            (
                "max_margin",
                abs(self._mean("margin")) if "margin" in metrics else 0.0,
                self._limits.max_margin,
                "the margin",
            ),
            ("max_real_logp_drop", self._drop(), self._limits.max_real_logp_drop, "the share by which log p(y) fell"),
        ]:
            if limit is not None and value > limit:
                cure = "lower train.learning_rate" + (" or raise objective.beta" if compares else "")
                raise HealthError(
                    f"stopped after step {step}: {meaning} is {value:.3g} over the last {self._over} steps, "
                    f"more than health.{name} {limit:g}: the model is running away from the data; {cure} (or raise the "
                    "limit: training then goes on from the last checkpoint)"
                )

    def _mean(self, name: str) -> float:
        return float(np.mean([line[name] for line in self._recent]))

    def _drop(self) -> float:
        """Returns the fall of log p(y) as a share of −log p(y) at the iteration's start."""
        if "real_logp_drift" not in self._recent[-1]:
            return 0.0
        drift = self._mean("real_logp_drift")
        return -drift / max(drift - self._mean("real_logp"), 1e-9)
