"""The description of a training."""

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.step import Objective, PackShape
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.names import part_name, train_log_path
from spin_ray.run_dir.storage import Storage


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    storage: Storage
    start: ModelFolder
    rows: Artefact
    """Pairs, or prompts for SFT."""
    target: Artefact
    objective: Objective
    shape: PackShape
    backend: BackendSettings
    recipe: SpinConfig
    """Recipe from which workers take mesh, gradient checkpointing, checkpoints and health."""
    epochs: int
    schedule_epochs: int | None = None
    """Epochs of the learning rate's schedule; None: ``epochs``."""
    seed: int
    chat_template: str | None
    """Chat template to export with the weights."""
    end_of_turn_id: int | None = None
    """Token at which responses end, to export with the weights."""
    reference: Artefact | None = None
    """Scores under ``start``, made by the job if the loss needs them."""
    base: Artefact | None = None
    """Scores under θ_0, for a geometric reference."""
    reference_alpha: float = 1.0
    """Weight of ``start`` in the geometric reference."""
    wins: Artefact | None = None
    audit: str | None = None
    """File of responses with the engine's log p; None: nothing was generated."""
    teacher_rows: Artefact | None = None
    """y′ after prompts with a demonstration, if the objective has a teacher."""
    teacher: Artefact | None = None
    """The teacher's distributions of ``teacher_rows``, made by the job."""

    @property
    def name(self) -> str:
        """Folder of the iterate, e.g. ``iter_000``."""
        return self.target.path.rpartition("/")[0]

    @property
    def elastic(self) -> bool:
        """True if checkpoints of another number of workers are accepted."""
        return self.recipe.train.min_workers is not None

    def inputs(self) -> dict[str, str]:
        inputs = {"rows": self.rows.manifest().digest, "start_model": self.start.digest}
        more = {"base_scores": self.base, "wins": self.wins, "teacher_rows": self.teacher_rows}
        return inputs | {name: artefact.manifest().digest for name, artefact in more.items() if artefact}

    def settings(self) -> dict[str, Any]:
        optimizer = self.backend.optimizer
        return {
            **asdict(self.objective), "reference_alpha": self.reference_alpha,
            "epochs": self.epochs, "schedule_epochs": self.schedule_epochs,
            "learning_rate": self.backend.learning_rate, "seed": self.seed,
            "pack_length": self.shape.pack_length, "global_batch_pairs": self.shape.global_batch_pairs,
            "precision": self.backend.precision, "attention": self.backend.attention,
            "optimizer": optimizer.model_dump(mode="json") if optimizer else None,
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        return {**self.inputs(), **self.settings()}

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints; those of each ``identity`` have a folder of their own in it."""
        return f"{self.name}/checkpoints"

    @property
    def log_path(self) -> str:
        return train_log_path(self.name)

    def logged(self) -> list[dict[str, Any]]:
        return read_json_lines(self.storage, self.log_path)


def commit_parts(
    target: Artefact, part: pa.Table, shape: PackShape, inputs: dict[str, str], settings: dict[str, Any]
) -> None:
    """Writes this rank's part and commits all ranks' parts; a collective."""
    rank, ranks = shape.place()
    if shape.writes():
        target.replace_part(part_name(rank), part)
    dist.barrier()
    if dist.get_rank() == 0:
        names = [part_name(number) for number in range(ranks)]
        target.commit({name: target.part_entry(name) for name in names}, inputs, settings)
    dist.barrier()
