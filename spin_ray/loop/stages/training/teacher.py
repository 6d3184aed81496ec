"""The teacher of SDFT: θ_t with a demonstration in its prompt.

Its k likeliest tokens at each token of y′ are committed before the first step.
"""

import pyarrow as pa
import torch

from spin_ray.errors import RunDirError
from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.distillation import ReadTop
from spin_ray.learner.step import feed, own_packs
from spin_ray.learner.teacher import Teacher, teacher_columns
from spin_ray.loop.stages.training.job import TrainJob, commit_parts
from spin_ray.run_dir.schemas import TEACHER_SCHEMA


def load_teacher(job: TrainJob, backend: TrainBackend, pair_ids: pa.ChunkedArray, own: set[int]) -> Teacher | None:
    """Returns the teacher's distributions for the rows ``own``; None without a teacher.

    The backend must still hold θ_t, unless the distributions are committed.

    Raises:
        RunDirError: a pair has no distributions.
    """
    if job.teacher is None or job.teacher_rows is None:
        return None
    _score(job, backend)
    names = pair_ids.to_pylist()
    try:
        return Teacher.of(job.teacher.tables(), {names[row]: row for row in own})
    except ValueError as error:
        raise RunDirError(f"{job.teacher.path}: {error}; remove the folder") from error


def _score(job: TrainJob, backend: TrainBackend) -> None:
    target, source = job.teacher, job.teacher_rows
    assert target is not None and source is not None
    inputs = {"teacher_rows": source.manifest().digest, "start_model": job.start.digest}
    settings = {
        "top_k": job.objective.top_k, "pack_length": job.shape.pack_length, "precision": job.backend.precision,
    }  # fmt: skip
    if target.already_made(inputs, settings):
        return
    rows = pa.concat_tables(source.tables())
    packs = own_packs(rows, job.shape, job.seed)
    pair_ids, reader, parts = rows["pair_id"].to_pylist(), ReadTop(job.objective.top_k), [TEACHER_SCHEMA.empty_table()]
    with torch.no_grad():
        for _, batch in feed(packs, rows, job.shape, backend.device):
            parts.append(teacher_columns(pair_ids, backend.read(batch, reader), batch).cast(TEACHER_SCHEMA))
    commit_parts(target, pa.concat_tables(parts), job.shape, inputs, settings)
