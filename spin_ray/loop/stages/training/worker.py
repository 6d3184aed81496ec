"""The work of each train worker, from loading θ_t to exporting θ_{t+1} as a Hugging Face folder."""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from spin_ray.config.sections import Mesh
from spin_ray.errors import RunDirError
from spin_ray.learner.backends import make_backend
from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.health import HealthMonitor
from spin_ray.learner.packing import Step
from spin_ray.learner.published import name_end, set_template
from spin_ray.learner.step import ReferenceScores, pair_lengths, plan, rows_of_rank, score_rows, train_step
from spin_ray.loop.stages.training import checkpoint
from spin_ray.loop.stages.training.audit import audit_engine
from spin_ray.loop.stages.training.job import TrainJob, commit_parts
from spin_ray.loop.stages.training.log import TrainLog
from spin_ray.loop.stages.training.recomputation import recomputes
from spin_ray.loop.stages.training.teacher import load_teacher
from spin_ray.planning.disk import checkpoint_bytes, free_bytes, parameters_of
from spin_ray.planning.learner_cost import offload_warning
from spin_ray.planning.mesh import Choice, mesh_of
from spin_ray.planning.weights import dtype_bytes
from spin_ray.run_dir.artefact import Artefact, Manifest, folder_entries
from spin_ray.run_dir.schemas import REFERENCE_SCHEMA, pairs_of
from spin_ray.run_dir.storage import MANIFEST
from spin_ray.runtime.workers import device, nodes_and_room

logger = logging.getLogger(__name__)

UNSAVED_S = 600.0
"""Longest time of steps, in seconds, that an export which fails may cost. More is saved before the export.

A checkpoint is four times as large as an exported model, and 29 s of a 7B on one node (docs/scale.md).
"""
_TOKENS = ("prompt_ids", "real_ids", "generated_ids", "initial_ids")


def work(job: TrainJob) -> dict[str, Any]:
    """Does this rank's part of the job. Returns what train_log.jsonl lacks; ``work_s`` is without the steps."""
    if _on_all_ranks(lambda: dist.get_rank() != 0 or _is_made(job)):  # by workers that died after their commit
        return {"work_s": 0.0}
    job, choice = _on_a_mesh(job)
    rank, ranks = job.shape.place()
    planned = plan(
        pair_lengths(_pairs(job.rows)), job.shape, epochs=job.schedule_epochs or job.epochs, seed=job.seed, ranks=ranks
    )
    epochs = planned[: job.epochs]
    own = rows_of_rank(epochs, rank, ranks)
    table = _share(_pairs(job.rows), own)
    steps = [step for epoch in epochs for step in epoch]
    backend, recomputed = _backend(job, total_steps=sum(map(len, planned)))
    _warn_of_offload(job, max((ceil(len(step.packs) / ranks) for step in steps), default=0), choice.mesh)
    started = time.monotonic()
    audited = audit_engine(job, backend)
    reference = _reference(job, backend, epochs[0], table)
    teacher = load_teacher(job, backend, table["pair_id"], own)
    work_s = time.monotonic() - started
    first = checkpoint.restore(job, backend)
    log, health = TrainLog(job, first), HealthMonitor(job.recipe.health, len(steps))
    saved = time.monotonic()
    for number in range(first, len(steps)):
        started = time.monotonic()
        metrics = train_step(backend, steps[number], table, job.shape, job.objective, reference, teacher)
        log.write({"step": number, **metrics, "seconds": round(time.monotonic() - started, 3), "of": len(steps)})
        health.check(number, metrics)
        if (number + 1) % job.recipe.train.checkpoint_every_steps == 0 and number + 1 < len(steps):
            checkpoint.save(job, backend, number + 1)
            saved = time.monotonic()
    if _on_all_ranks(lambda: time.monotonic() - saved > UNSAVED_S and _has_room(job)):
        checkpoint.save(job, backend, len(steps))
    _export(job, backend)
    mesh = {"mesh": f"{choice.mesh}: {choice.reason}"} if choice.mesh.ranks > 1 else {}
    chosen = {"recomputed": recomputed} if job.recipe.train.gradient_checkpointing == "auto" else {}
    return {"work_s": work_s} | audited | mesh | chosen


def _on_a_mesh(job: TrainJob) -> tuple[TrainJob, Choice]:
    choice = mesh_of(job.recipe, job.start.parts_here()[0], *nodes_and_room())
    if dist.get_rank() == 0:
        logger.info("%s", choice)
    backend, shape = replace(job.backend, mesh=choice.mesh), replace(job.shape, tensor=choice.mesh.tensor)
    return replace(job, backend=backend, shape=shape), choice


def _warn_of_offload(job: TrainJob, packs: int, mesh: Mesh) -> None:
    if not job.recipe.train.offload or dist.get_rank() or job.backend.lora is not None:
        return
    if warning := offload_warning(job.recipe, parameters_of(job.start.parts_here()[0]), packs, mesh):
        logger.warning("%s", warning)


def _backend(job: TrainJob, *, total_steps: int) -> tuple[TrainBackend, bool]:
    """Returns the backend, and whether it computes activations again."""
    folder, adapter = job.start.parts_here()
    settings = replace(job.backend, total_steps=total_steps, seed=job.seed, adapter=adapter)
    assert settings.optimizer is not None
    recomputed = recomputes(job.recipe, settings.optimizer, folder, device(), job.backend.mesh)
    return make_backend(folder, replace(settings, gradient_checkpointing=recomputed), device()), recomputed


def _pairs(rows: Artefact) -> Iterator[pa.Table]:
    """Yields rows of pairs as they are, and rows of prompts as pairs without y′."""
    for part in rows.tables():
        if "pair_id" not in part.column_names:
            names = part["prompt_id"].to_pylist()
            part = pairs_of(names, 0, names, part["prompt_ids"], part["real_ids"])
        yield part


def _share(parts: Iterable[pa.Table], own: set[int]) -> pa.Table:
    """Returns ``pair_id`` of all rows, and tokens of ``own`` rows only."""
    kept: list[pa.Table] = []
    first = 0
    for part in parts:
        rows = pa.array([row if first + row in own else None for row in range(part.num_rows)], pa.int64())
        names = [name for name in _TOKENS if name in part.column_names]
        kept.append(pa.table({"pair_id": part["pair_id"]} | {name: part[name].take(rows) for name in names}))
        first += part.num_rows
    return pa.concat_tables(kept)


def _reference(job: TrainJob, backend: TrainBackend, steps: list[Step], table: pa.Table) -> ReferenceScores | None:
    if job.reference is None:
        return None
    _score_reference(job, backend, steps, table)
    reference = _load_reference(job.reference, table)
    if job.base is not None:
        reference = reference.mixed_with(_load_reference(job.base, table), job.reference_alpha)
    if job.wins is not None:
        real_win, generated_win = _load_by_pair(job.wins, table, ("real_win", "generated_win"))
        reference = replace(reference, real_win=real_win, generated_win=generated_win)
    return reference


def _score_reference(job: TrainJob, backend: TrainBackend, steps: list[Step], table: pa.Table) -> None:
    """Commits log p_θt of every pair. The backend must still hold θ_t."""
    target = job.reference
    assert target is not None
    inputs = job.inputs()
    settings = {"pack_length": job.shape.pack_length, "precision": job.backend.precision, "seed": job.seed}
    if target.already_made(inputs, settings):
        return
    rows, real, generated = score_rows(backend, steps, table, job.shape)
    part = pa.table([table["pair_id"].take(pa.array(rows, pa.int64())), real, generated], schema=REFERENCE_SCHEMA)
    commit_parts(target, part, job.shape, inputs, settings)


def _load_reference(reference: Artefact, table: pa.Table) -> ReferenceScores:
    real, generated = _load_by_pair(reference, table, ("real_logp", "generated_logp"))
    return ReferenceScores(real=real, generated=generated)


def _load_by_pair(artefact: Artefact, table: pa.Table, columns: tuple[str, ...]) -> list[torch.Tensor]:
    scores = pa.concat_tables(list(artefact.tables()))
    found = pc.index_in(table["pair_id"], value_set=scores["pair_id"])
    if found.null_count or scores.num_rows != table.num_rows:
        raise RunDirError(
            f"{artefact.path}: {scores.num_rows} scores for {table.num_rows} pairs, {found.null_count} without one; "
            "remove the folder"
        )
    if len(found.unique()) != table.num_rows:
        raise RunDirError(
            f"{artefact.path}: pairs share a pair_id, so that scores cannot be told apart; number them, and remove the "
            "folders of pairs and scores"
        )
    ordered = scores.take(found)
    return [torch.tensor(ordered[name].to_numpy()).to(device()) for name in columns]


def _on_all_ranks(condition: Callable[[], bool]) -> bool:
    holds = torch.tensor(int(condition()), device=device())
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


def _is_made(job: TrainJob) -> bool:
    return job.target.already_made(job.inputs(), job.settings())


def _has_room(job: TrainJob) -> bool:
    """Tells whether a checkpoint and the model fit on the disk, so that one does not keep the other from its room."""
    attempt, optimizer = job.storage.new_attempt_folder(), job.backend.optimizer
    free = free_bytes(attempt)
    attempt.rmdir()
    if free is None or optimizer is None or job.backend.lora is not None:
        return True
    parameters = parameters_of(job.start.parts_here()[0])
    return free > checkpoint_bytes(job.recipe, optimizer, parameters) + dtype_bytes(job.recipe) * parameters


def _export(job: TrainJob, backend: TrainBackend) -> None:
    """Exports θ_{t+1}. Its folder appears at once, with the manifest.

    Raises:
        StageError: the folder could not be written.
    """
    if dist.get_rank() == 0:
        attempt = job.storage.new_attempt_folder()
        try:
            backend.export_hf(attempt)
            _commit(job, attempt)
        except (OSError, SafetensorError) as error:
            raise checkpoint.could_not_be_written(job.storage.where(job.target.path), error) from error
        finally:
            shutil.rmtree(attempt, ignore_errors=True)
    else:  # without waiting for rank 0, whose hashes and upload may take longer than a collective may
        backend.export_hf(Path())


def _commit(job: TrainJob, attempt: Path) -> None:
    if job.chat_template is not None:
        set_template(attempt, job.chat_template)
    if job.end_of_turn_id is not None:
        start, _ = job.start.parts_here()
        name_end(attempt, job.end_of_turn_id, start, trust_remote_code=job.backend.trust_remote_code)
    manifest = Manifest.of(folder_entries(attempt), job.inputs(), job.settings())
    (attempt / MANIFEST).write_bytes(manifest.to_bytes())
    try:
        job.storage.create_folder(job.target.path, attempt)
    except FileExistsError:
        if not _is_made(job):
            raise
