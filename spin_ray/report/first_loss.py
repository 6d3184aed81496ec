"""The loss of a training's first step."""

import math

from spin_ray.config.algorithms import facts_of
from spin_ray.config.recipe import SpinConfig

_AT_MARGIN_0 = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}


def first_loss(config: SpinConfig) -> float | None:
    """Returns the loss where the policy equals its reference, as at each iteration's step 0. None if unknown, or if
    ``reference_alpha`` gives another reference.
    """
    objective = config.objective
    if not facts_of(config.algorithm).learns_loss or objective.reference_alpha < 1:
        return None
    if objective.loss == "space":
        mu = objective.mu
        return (1 + mu) * math.log1p(mu) - mu * math.log(mu)
    return _AT_MARGIN_0.get(objective.loss)


def spelt(loss: float) -> str:
    """Returns a first loss as text: ``ln 2``, or four digits."""
    return "ln 2" if loss == _AT_MARGIN_0["logistic"] else f"{loss:.4g}"
