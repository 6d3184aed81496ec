"""The cost of one stage: time, and memory of the fullest device."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spin_ray.planning.hardware import GB

RUNTIME = 2 * GB
"""Bytes of CUDA context, buffers and fragmentation, an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The cost of one stage.

    The time is a roofline: the longer of computation and the transfers that computation hides.
    """

    name: str
    tokens: float
    """Tokens of all epochs, without padding."""
    flops: float
    """FLOPs of all epochs. A multiply-add is 2."""
    seconds: float
    bound: str
    """Largest part of the time."""
    memory: dict[str, float]
    """Bytes by purpose on the fullest device."""
    room: float
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that a train worker sends to others and its host, by kind of collective."""

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room


def summed(passes: Sequence[StageCost]) -> StageCost:
    """Returns the cost of passes one after the other; memory and bound are those of the one that needs most."""
    return replace(
        max(passes, key=lambda cost: cost.needed),
        tokens=sum(cost.tokens for cost in passes),
        flops=sum(cost.flops for cost in passes),
        seconds=sum(cost.seconds for cost in passes),
        sent={kind: sum(cost.sent.get(kind, 0.0) for cost in passes) for cost in passes for kind in cost.sent},
    )
