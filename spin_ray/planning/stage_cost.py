"""The cost of one stage: tokens, FLOPs, seconds, and bytes by purpose."""

from dataclasses import dataclass

from spin_ray.planning.hardware import GB

RUNTIME = 2 * GB
"""CUDA context, communication buffers, workspaces and fragmentation of one process. An assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The cost of one stage.

    The time is a roofline (Williams, Waterman, Patterson 2009): the longer of FLOPs / reachable FLOP/s and
    bytes / reachable bytes/s.
    """

    name: str
    tokens: float
    """Prompt and response tokens over all epochs, without padding."""
    flops: float
    """FLOPs over all epochs; a multiply-add is 2."""
    seconds: float
    bound: str
    """Name of what takes most of the time."""
    memory: dict[str, float]
    """Bytes by purpose on the fullest device (a GPU, or a worker's share of the host)."""
    room: float
    """Bytes that the device has."""

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room
