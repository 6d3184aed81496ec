from dataclasses import dataclass, field

from spin_ray.planning.hardware import GB

RUNTIME = 2 * GB
"""CUDA context, buffers and fragmentation of a process. An assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The cost of one stage.

    The time is a roofline: the longer of computing and moving bytes that the computation hides.
    """

    name: str
    tokens: float
    """All epochs' tokens, without padding."""
    flops: float
    """All epochs' FLOPs; a multiply-add is 2."""
    seconds: float
    bound: str
    """Name of what takes most of the time."""
    memory: dict[str, float]
    """Bytes by purpose on the fullest device."""
    room: float
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that one train worker sends to others and to its host, by kind of collective."""

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room
