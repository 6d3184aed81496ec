"""Room that a run needs for its iterates and checkpoints."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ResourceError
from spin_ray.learner.weights import tensor_shapes
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import moments_of
from spin_ray.planning.weights import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """Bytes in the run folder; logs, answers and adapters are left out."""

    iterate: float
    iterates: int
    """Iterates that are still to be made and have weights of their own."""
    checkpoint: float
    """A checkpoint of all workers together; 0 with adapters."""
    checkpoints: int
    """Checkpoints that are there at once."""

    @property
    def most(self) -> float:
        return self.iterates * self.iterate + self.checkpoints * self.checkpoint

    def __str__(self) -> str:
        parts = [f"{self.iterates} × {self.iterate / GB:.1f} GB of iterates"] if self.iterates else []
        if self.checkpoint:
            parts.append(f"{self.checkpoints} × {self.checkpoint / GB:.1f} GB of checkpoints while training")
        return " and ".join(parts) or "adapters alone"


def disk_use(config: SpinConfig, parameters: float, *, done: int = 0) -> DiskUse:
    """Returns what the run writes from now on.

    The checkpoint of a step is whole before the last one is deleted, so that there are two for a moment.

    Args:
        done: iterates that have been made.
    """
    train, left = config.train, max(0, config.iterations - done)
    # FSDP2 keeps fp32 weights and moments; DeepSpeed the computed weights, too.
    numbers = 4 * (1 + moments_of(train.optimizer))
    numbers += dtype_bytes(config) if train.backend == "deepspeed" else 0
    return DiskUse(
        iterate=dtype_bytes(config) * parameters,
        iterates=0 if config.commits_adapters else left,
        checkpoint=0 if train.lora else numbers * parameters,
        checkpoints=left + 1 if config.storage.keep_checkpoints else 2,
    )


def parameters_of(folder: Path) -> int:
    """Counts a model's weights."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


def check_room(use: DiskUse, out: Path) -> str | None:
    """Returns a warning if the disk of ``out`` may become full.

    Raises:
        ResourceError: not even the next iterate fits.
    """
    free = free_bytes(out)
    if free is None or free >= use.most:
        return None
    told = f"{out}: {free / GB:.1f} GB are free there"
    if use.iterates and free < use.iterate:
        raise ResourceError(f"{told}, and an iterate takes {use.iterate / GB:.1f} GB; free some, or give another --out")
    return f"{told}, and the run may need {use.most / GB:.1f} GB ({use})"


def free_bytes(folder: Path) -> float | None:
    """Returns the bytes free on the disk of ``folder``, which need not exist; None if the disk does not tell."""
    room = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    return float(room.free) if room.total else None
