"""Room that a run needs for its models and checkpoints."""

import math
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ResourceError
from spin_ray.learner.weights import tensor_shapes
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import moments_of
from spin_ray.planning.weights import dtype_bytes
from spin_ray.run_dir.names import iterate_number
from spin_ray.run_dir.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """Bytes in the run folder; logs, answers and adapters are left out."""

    model: float
    """All weights of an iterate or of the reviser."""
    models: int
    """Whole models that are still to be made."""
    checkpoints: Mapping[float, int]
    """Checkpoints that are there at once, by the bytes of all workers together; none of adapters."""

    @property
    def most(self) -> float:
        return self.models * self.model + _total(self.checkpoints)

    def __str__(self) -> str:
        parts = [f"{self.models} × {self.model / GB:.1f} GB of whole models"] if self.models else []
        parts += [
            f"{count} × {size / GB:.1f} GB of checkpoints while training" for size, count in self.checkpoints.items()
        ]
        return " and ".join(parts) or "adapters alone"


def disk_use(config: SpinConfig, parameters: float, *, done: int = 0, tuned: Collection[str] = ()) -> DiskUse:
    """Returns what the run writes from now on.

    The warm-up and the reviser write all weights, with adapters, too.

    Args:
        done: iterates that have been trained.
        tuned: sections, ``sft`` or ``reviser``, whose model has been made.
    """
    train, left = config.train, max(0, config.iterations - done)
    tunings = [how for name, how in config.trainings.items() if name not in ("train", *tuned)]
    trainings = [(checkpoint_bytes(config, how.optimizer, parameters), 1) for how in tunings]
    if left and not train.lora:
        trainings.append((checkpoint_bytes(config, train.optimizer, parameters), left))
    return DiskUse(
        model=dtype_bytes(config) * parameters,
        models=len(tunings) + (0 if config.commits_adapters else left),
        checkpoints=_at_once(trainings, kept=config.storage.keep_checkpoints),
    )


def use_of_run(config: SpinConfig, run: RunDir, parameters: float) -> DiskUse:
    """Returns what ``run``, which may have begun, still writes."""
    tuned = [name for name in ("sft", "reviser") if run.artefact(f"{name}/model").is_committed]
    return disk_use(config, parameters, done=iterate_number(run.latest() or "sft"), tuned=tuned)


def checkpoint_bytes(config: SpinConfig, optimizer: OptimizerConfig, parameters: float) -> float:
    """Returns the bytes of a checkpoint of all weights, of all workers together.

    FSDP2 keeps fp32 weights and moments; DeepSpeed the computed weights, too.
    """
    numbers = 4 * (1 + moments_of(optimizer))
    return (numbers + (dtype_bytes(config) if config.train.backend == "deepspeed" else 0)) * parameters


def _at_once(trainings: Sequence[tuple[float, int]], *, kept: bool) -> Counter[float]:
    """Returns the checkpoints of the fullest moment.

    The checkpoint of a step is whole before the last one is deleted, so that there are two for a moment.

    Args:
        trainings: size of a checkpoint, and number of trainings with such, in turn.
    """
    moments, before = [], Counter[float]()
    for size, count in trainings:
        moments.append(before + Counter({size: count + 1 if kept else 2}))
        before += Counter({size: count if kept else 0})
    return max(moments, key=_total, default=Counter())


def _total(checkpoints: Mapping[float, int]) -> float:
    return sum(size * count for size, count in checkpoints.items())


def parameters_of(folder: Path) -> int:
    """Counts a model's weights."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


def check_room(use: DiskUse, out: Path) -> str | None:
    """Returns a warning if the disk of ``out`` may become full.

    Raises:
        ResourceError: not even the next model fits.
    """
    free = free_bytes(out)
    if free is None or free >= use.most:
        return None
    told = f"{out}: {free / GB:.3g} GB are free there"
    if use.models and free < use.model:
        raise ResourceError(f"{told}, and a model takes {use.model / GB:.3g} GB; free some, or give another --out")
    return f"{told}, and the run may need {use.most / GB:.1f} GB ({use})"


def free_bytes(folder: Path) -> float | None:
    """Returns the bytes free on the disk of ``folder``, which need not exist; None if the disk does not tell."""
    room = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    return float(room.free) if room.total else None
