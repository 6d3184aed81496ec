"""When training should stop by itself: the numbers of the last steps say that the model is being destroyed.

A good loss says nothing here: in a collapse that was seen it fell to 0.39 while the margin ran up to 16 nats.
"""

from collections import deque
from typing import Any

import numpy as np

from spin_ray.config.sections import HealthConfig
from spin_ray.errors import HealthError


class HealthMonitor:
    """Watches the means over the last ``limits.steps`` steps. Metrics are equal on all ranks, so all stop alike."""

    def __init__(self, limits: HealthConfig) -> None:
        self._limits = limits
        self._recent: deque[dict[str, Any]] = deque(maxlen=limits.steps)

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes in what ``train_step`` returned for ``step``; warm-up (SFT) has no margins and is not judged.

        Raises:
            HealthError: a limit is passed; the message names it, the value and what to change.
        """
        if "margin" not in metrics:
            return
        self._recent.append(metrics)
        if len(self._recent) < self._limits.steps:
            return
        loss, margin, real_logp, drift = (
            float(np.mean([line[name] for line in self._recent]))
            for name in ("loss", "margin", "real_logp", "real_logp_drift")
        )
        drop = -drift / max(drift - real_logp, 1e-9)  # as a share of -log p(y) at the start of the iteration
        for name, value, limit, meaning in [
            ("max_loss", loss, self._limits.max_loss, "the loss"),
            ("max_margin", abs(margin), self._limits.max_margin, "the margin"),
            ("max_real_logp_drop", drop, self._limits.max_real_logp_drop, "the share by which log p(y) fell"),
        ]:
            if limit is not None and value > limit:
                raise HealthError(
                    f"stopped after step {step}: {meaning} is {value:.3g} over the last {self._limits.steps} steps, "
                    f"more than health.{name} {limit:g}: the model is running away from the data; lower "
                    "train.learning_rate or raise objective.beta (or raise the limit: training then goes on from "
                    "the last checkpoint)"
                )
