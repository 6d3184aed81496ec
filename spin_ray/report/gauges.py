"""Numbers of a run in Ray's Prometheus endpoint, under the names that trackers have them by.

``train/loss`` is ``ray_spin_ray_train_loss{run="NAME"}``, ``eval/against_opponent.loss`` is
``ray_spin_ray_eval_against_opponent_loss``: Prometheus allows letters, digits and ``_`` only, and Ray adds its prefix.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

NOT_LOGGED = ("step", "of")
"""Keys of a line of train_log.jsonl that are no measure."""


def metric_name(name: str) -> str:
    """``eval/against_opponent.loss`` -> ``spin_ray_eval_against_opponent_loss``."""
    return f"spin_ray_{re.sub('[^a-zA-Z0-9]', '_', name)}"


def of_step(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of train_log.jsonl by the names of its measures, and where training is."""
    named = {f"train/{key}": float(value) for key, value in line.items() if key not in NOT_LOGGED}
    return named | {"progress/step": float(line["step"]), "progress/steps": float(line["of"])}


def set_all(run: str, values: Mapping[str, float]) -> None:
    """Sets the gauges of a run; nothing without Ray, whose agents export them."""
    import ray
    from ray.util.metrics import Gauge

    if not ray.is_initialized():
        return
    for name, value in values.items():
        if math.isfinite(value):
            Gauge(metric_name(name), f"{name} of spin_ray", ("run",)).set(value, tags={"run": run})
