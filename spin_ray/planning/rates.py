"""Measured rates of training and scoring.

``python benchmarks/tables.py rates`` writes ``rates.json`` from the results of ``make gpu-bench``.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path

from spin_ray.planning.hardware import Hardware

SIMILAR_SIZE = 4.0
"""Largest ratio of parameters at which one model's rate is used for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRate:
    card: str
    """Name in ``hardware.GPUS``."""
    stage: str
    """``training`` or ``scoring``, in bf16."""
    parameters: float
    mfu: float
    """FLOP/s that the model needs (``learner_cost.needed_flops``), over the data sheet's dense bf16 rate."""
    measured: str
    commit: str

    def __str__(self) -> str:
        return f"{self.card}, {self.parameters / 1e9:.2g}B parameters, {self.measured}, commit {self.commit}"


@cache
def known_rates() -> tuple[MeasuredRate, ...]:
    table = json.loads(Path(__file__).with_name("rates.json").read_text())
    return tuple(MeasuredRate(**row) for row in table["rates"])


def rate_of(card: str, stage: str, parameters: float) -> MeasuredRate | None:
    """Returns the stage's rate at the nearest model size; None beyond ``SIMILAR_SIZE``."""

    def distance(rate: MeasuredRate) -> float:
        return abs(log(rate.parameters / parameters))

    same = [rate for rate in known_rates() if (rate.card, rate.stage) == (card, stage)]
    nearest = min(same, key=distance, default=None)
    return nearest if nearest and distance(nearest) <= log(SIMILAR_SIZE) else None


def at_measured_rate(device: Hardware, stage: str, parameters: float, precision: str) -> Hardware | None:
    """Returns the device with its measured rate, if there is one. It applies to ``learner_cost.needed_flops``."""
    rate = rate_of(device.name, stage, parameters) if precision == "bf16" else None
    return replace(device, efficiency=rate.mfu) if rate else None
