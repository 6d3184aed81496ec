"""Stage 4: reference scores, then θ_t -> θ_{t+1}; also the SFT warm-up, which is the same work with another objective.

driver: TorchTrainer over train.workers
worker: load θ_t -> score all pairs with it (the reference: stored, never redone with a moved policy)
        -> steps, with a checkpoint now and then -> export as a Hugging Face folder with its manifest
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import torch
import torch.distributed as dist

from spin_ray.config.sections import HealthConfig, OptimizerConfig, SftConfig, SpinConfig, digest
from spin_ray.errors import RunDirError
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.backends import make_backend
from spin_ray.learner.backends.base import BackendSettings, TrainBackend
from spin_ray.learner.health import HealthMonitor
from spin_ray.learner.losses import resolve_loss
from spin_ray.learner.step import (
    Objective,
    PackShape,
    ReferenceScores,
    pair_lengths,
    plan,
    rows_of_rank,
    score_rows,
    train_step,
)
from spin_ray.loop.stages.training import checkpoint
from spin_ray.report import gauges
from spin_ray.report.progress import StageProgress
from spin_ray.run_dir.run_dir import MANIFEST, Artefact, Manifest, RunDir, folder_entries, part_name, read_json_lines
from spin_ray.run_dir.schemas import PAIR_SCHEMA, REFERENCE_SCHEMA
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.resources import demands, wait_until_free
from spin_ray.runtime.workers import device, run_workers

_TOKENS = ("prompt_ids", "real_ids", "generated_ids")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a worker needs; the same on all ranks."""

    name: str
    """Folder of the iterate, e.g. ``iter_000``."""
    storage: Storage
    start: ModelFolder
    rows: Artefact
    """Pairs, or prompts for SFT."""
    reference: Artefact | None
    """Where log p of the rows under ``start`` go; None for an objective without a reference."""
    base: Artefact | None
    """log p of the rows under θ_0, where the reference is a geometric mixture with it."""
    wins: Artefact | None
    """Win probabilities of the rows, for the square loss."""
    reference_alpha: float
    """Weight of ``start`` in that mixture; 1: ``start`` alone."""
    target: Artefact
    objective: Objective
    shape: PackShape
    backend: BackendSettings
    epochs: int
    seed: int
    checkpoint_every_steps: int
    health: HealthConfig
    elastic: bool
    """Whether to go on from checkpoints of another number of workers."""
    chat_template: str | None
    """The template that the config put in place of the model's; exported with the weights."""

    def inputs(self) -> dict[str, str]:
        inputs = {"rows": self.rows.manifest().digest, "start_model": self.start.digest}
        more = {"base_scores": self.base, "wins": self.wins}
        return inputs | {name: artefact.manifest().digest for name, artefact in more.items() if artefact}

    def settings(self) -> dict[str, Any]:
        optimizer = self.backend.optimizer
        return {
            "loss": self.objective.loss, "beta": self.objective.beta, "sft_weight": self.objective.sft_weight,
            "length_normalised": self.objective.length_normalised, "reference_alpha": self.reference_alpha,
            "epochs": self.epochs, "learning_rate": self.backend.learning_rate, "seed": self.seed,
            "pack_length": self.shape.pack_length, "global_batch_pairs": self.shape.global_batch_pairs,
            "precision": self.backend.precision, "attention": self.backend.attention,
            "optimizer": optimizer.model_dump(mode="json") if optimizer else None,
        }  # fmt: skip

    @property
    def log_path(self) -> str:
        return f"{self.name}/train_log.jsonl"


def run(run_dir: RunDir, config: SpinConfig, iteration: int, opponent: ModelFolder, objective: Objective) -> None:
    """Trains θ_{t+1} from θ_t on the pairs of the iteration and commits ``iter_NNN/model``.

    Raises:
        HealthError: the model is being destroyed; a limit of the config says so.
        StageError: the workers failed too often; the same command goes on from the last checkpoint.
    """
    values = config.at(iteration)
    base, wins = run_dir.base_scores(iteration), run_dir.wins(iteration)
    loss, target = resolve_loss(objective.loss), run_dir.model(iteration + 1)
    job = TrainJob(
        name=target.path.partition("/")[0],
        storage=run_dir.storage,
        start=opponent,
        rows=run_dir.pairs(iteration),
        reference=run_dir.reference(iteration) if loss.needs_reference else None,
        base=base if loss.needs_reference and base.is_committed else None,
        wins=wins if loss.needs_wins else None,
        reference_alpha=config.objective.reference_alpha,
        target=target,
        objective=objective,
        shape=PackShape(
            pack_length=config.train.pack_length,
            global_batch_pairs=config.train.global_batch_pairs,
            pad_id=opponent.pad_id,
        ),
        backend=replace(
            _backend_settings(config, config.train.optimizer, values.learning_rate), lora=config.train.lora
        ),
        epochs=values.epochs,
        seed=config.seed + iteration,
        checkpoint_every_steps=config.train.checkpoint_every_steps,
        health=config.health,
        elastic=config.train.min_workers is not None,
        chat_template=_chat_template(config),
    )
    _train(run_dir, config, job)


def run_sft(run_dir: RunDir, config: SpinConfig, start: ModelFolder) -> None:
    """Trains θ_0 from the start model on the SFT data itself and commits ``sft/model``."""
    assert config.sft is not None
    fine_tune(run_dir, config, config.sft, start, run_dir.prompts, run_dir.model(0))


def fine_tune(
    run_dir: RunDir,
    config: SpinConfig,
    how: SftConfig,
    start: ModelFolder,
    rows: Artefact,
    target: Artefact,
) -> None:
    """Supervised fine-tuning of ``start`` on ``rows`` (prompts, or pairs without y'); commits ``target``."""
    job = TrainJob(
        name=target.path.partition("/")[0],
        storage=run_dir.storage,
        start=start,
        rows=rows,
        reference=None,
        base=None,
        wins=None,
        reference_alpha=1.0,
        target=target,
        objective=Objective(loss=None),
        shape=PackShape(
            pack_length=config.train.pack_length, global_batch_pairs=how.global_batch_rows, pad_id=start.pad_id
        ),
        backend=_backend_settings(config, how.optimizer, how.learning_rate),
        epochs=how.epochs,
        seed=config.seed,
        checkpoint_every_steps=config.train.checkpoint_every_steps,
        health=config.health,
        elastic=config.train.min_workers is not None,
        chat_template=_chat_template(config),
    )
    _train(run_dir, config, job)


def _chat_template(config: SpinConfig) -> str | None:
    path = config.model.chat_template
    return Path(path).read_text(encoding="utf-8") if path else None


def _backend_settings(config: SpinConfig, optimizer: OptimizerConfig, learning_rate: float) -> BackendSettings:
    return replace(
        BackendSettings.for_scoring(config),
        kind=config.train.backend,
        gradient_checkpointing=config.train.gradient_checkpointing,
        sharding=config.train.sharding,
        reduce_every_pack=config.train.reduce_every_pack,
        offload=config.train.offload,
        optimizer=optimizer,
        learning_rate=learning_rate,
    )


def _train(run_dir: RunDir, config: SpinConfig, job: TrainJob) -> None:
    if job.target.is_current(job.inputs(), job.settings()):
        return
    checkpoints = f"{job.name}/checkpoints"
    with run_dir.stage(f"{job.name}/training") as counted:
        with _Watcher(job):
            counted |= run_workers(
                _worker,
                job,
                config,
                digest([job.inputs(), job.settings()])[:16],
                run_dir.storage.where(checkpoints),
                progress=lambda: run_dir.storage.find(job.log_path),
            )
        counted |= {"rows": job.rows.manifest().rows}
        if not config.storage.keep_checkpoints:
            run_dir.storage.delete(checkpoints)
    wait_until_free(demands(config)["generation"], config.generation.start_timeout_s, "generation, after training")


def _worker(job: TrainJob) -> dict[str, float]:
    """Runs on every rank. Ends with ``job.target`` committed; returns what this attempt did."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    epochs = plan(pair_lengths(_pairs(job.rows)), job.shape, epochs=job.epochs, seed=job.seed, ranks=ranks)
    table = _share(_pairs(job.rows), rows_of_rank(epochs, rank, ranks))
    steps = [step for epoch in epochs for step in epoch]
    backend = make_backend(job.start.here(), replace(job.backend, total_steps=len(steps), seed=job.seed), device())
    reference, started = None, time.monotonic()
    if job.reference is not None:
        _score_reference(job, backend, epochs[0], table)
        reference = _load_reference(job.reference, table)
        if job.base is not None:
            reference = reference.mixed_with(_load_reference(job.base, table), job.reference_alpha)
        if job.wins is not None:
            real_win, generated_win = _load_by_pair(job.wins, table, ("real_win", "generated_win"))
            reference = replace(reference, real_win=real_win, generated_win=generated_win)
    work_s = time.monotonic() - started
    first = _restore(job, backend)
    log, health = _TrainLog(job, first), HealthMonitor(job.health)
    tokens = 0.0
    for number in range(first, len(steps)):
        started = time.monotonic()
        metrics = train_step(backend, steps[number], table, job.shape, job.objective, reference)
        seconds = time.monotonic() - started
        log.write({"step": number, **metrics, "seconds": round(seconds, 3), "of": len(steps)})
        health.check(number, metrics)
        work_s, tokens = work_s + seconds, tokens + metrics["tokens"]
        if (number + 1) % job.checkpoint_every_steps == 0 and number + 1 < len(steps):
            _checkpoint(job, backend, number + 1)
    _export(job, backend)
    return {"steps": len(steps) - first, "tokens": tokens, "work_s": work_s}


def _pairs(rows: Artefact) -> Iterator[pa.Table]:
    """PAIR_SCHEMA rows, part by part; prompts become rows without y'."""
    for part in rows.tables():
        if "pair_id" in part.column_names:
            yield part
            continue
        empty = pa.array([[]] * part.num_rows, PAIR_SCHEMA.field("generated_ids").type)
        iteration = pa.array([0] * part.num_rows, pa.int32())
        columns = {"pair_id": part["prompt_id"], "iteration": iteration, "generated_ids": empty}
        yield pa.table(
            [columns.get(name, part[name] if name in part.column_names else None) for name in PAIR_SCHEMA.names],
            schema=PAIR_SCHEMA,
        )


def _share(parts: Iterable[pa.Table], own: set[int]) -> pa.Table:
    """``pair_id`` of all rows; tokens of ``own`` ones, and null in the place of the others.

    An epoch draws its packs from all over the table, and a part's digest is of all its bytes: so every part is read,
    but no rank keeps more of it than it needs.
    """
    kept: list[pa.Table] = []
    first = 0
    for part in parts:
        rows = pa.array([row if first + row in own else None for row in range(part.num_rows)], pa.int64())
        kept.append(pa.table({"pair_id": part["pair_id"]} | {name: part[name].take(rows) for name in _TOKENS}))
        first += part.num_rows
    return pa.concat_tables(kept)


def _score_reference(job: TrainJob, backend: TrainBackend, steps: list[Any], table: pa.Table) -> None:
    """Commits log p_θt of every pair, unless an earlier attempt did. The backend still holds θ_t here."""
    target = job.reference
    assert target is not None
    inputs = job.inputs()
    settings = {"pack_length": job.shape.pack_length, "precision": job.backend.precision, "seed": job.seed}
    if target.is_current(inputs, settings):
        return
    rows, real, generated = score_rows(backend, steps, table, job.shape)
    part = pa.table([table["pair_id"].take(pa.array(rows, pa.int64())), real, generated], schema=REFERENCE_SCHEMA)
    target.replace_part(part_name(dist.get_rank()), part)
    dist.barrier()
    if dist.get_rank() == 0:
        names = [part_name(rank) for rank in range(dist.get_world_size())]
        target.commit({name: target.part_entry(name) for name in names}, inputs, settings)
    dist.barrier()


def _load_reference(reference: Artefact, table: pa.Table) -> ReferenceScores:
    """Scores in the order of ``table``."""
    real, generated = _load_by_pair(reference, table, ("real_logp", "generated_logp"))
    return ReferenceScores(real=real, generated=generated)


def _load_by_pair(artefact: Artefact, table: pa.Table, columns: tuple[str, ...]) -> list[torch.Tensor]:
    """Columns of an artefact in the order of ``table``, matched by pair id.

    Raises:
        RunDirError: a pair has no score, or more than one.
    """
    scores = pa.concat_tables(list(artefact.tables()))
    found = pc.index_in(table["pair_id"], value_set=scores["pair_id"])
    if found.null_count or scores.num_rows != table.num_rows:
        raise RunDirError(
            f"{artefact.path}: {scores.num_rows} scores for {table.num_rows} pairs, {found.null_count} without one; "
            "remove the folder"
        )
    ordered = scores.take(found)
    return [torch.tensor(ordered[name].to_numpy()).to(device()) for name in columns]


def _checkpoint(job: TrainJob, backend: TrainBackend, step: int) -> None:
    with tempfile.TemporaryDirectory(prefix="spin-ray-checkpoint-") as folder:
        backend.save(Path(folder))
        checkpoint.seal(Path(folder), step, _checkpoint_identity(job))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _restore(job: TrainJob, backend: TrainBackend) -> int:
    """Loads the newest checkpoint of this work, if there is one; returns the step to go on with.

    Raises:
        RunDirError: the checkpoint is damaged, or belongs to other work or another number of workers.
    """
    newest = ray.train.get_checkpoint()
    if newest is None:
        return 0
    with newest.as_directory() as folder:
        step = checkpoint.check(
            Path(folder),
            _checkpoint_identity(job),
            f"or remove {job.name}/checkpoints to train from the start",
            any_workers=job.elastic,
        )
        backend.load(Path(folder))
    return step


def _checkpoint_identity(job: TrainJob) -> dict[str, Any]:
    return {**job.inputs(), **job.settings()}


def _export(job: TrainJob, backend: TrainBackend) -> None:
    """θ_{t+1} as a Hugging Face folder that appears together with its manifest."""
    attempt = job.storage.new_attempt_folder() if dist.get_rank() == 0 else Path()
    backend.export_hf(attempt)
    if dist.get_rank() == 0:
        if job.chat_template is not None:
            (attempt / "chat_template.jinja").write_text(job.chat_template, encoding="utf-8")
        manifest = Manifest.of(folder_entries(attempt), job.inputs(), job.settings())
        (attempt / MANIFEST).write_bytes(manifest.to_bytes())
        job.storage.create_folder(job.target.path, attempt)
    dist.barrier()


class _TrainLog:
    """train_log.jsonl, written by rank 0; steps after the checkpoint that training resumes from are cut off first."""

    def __init__(self, job: TrainJob, first: int) -> None:
        self._job = job
        self._active = dist.get_rank() == 0
        if self._active:
            logged = read_json_lines(job.storage, job.log_path)
            kept = [line for line in logged if line["step"] < first]
            if len(kept) < len(logged):
                lost = {"steps": len(logged) - len(kept), "resumed_at": first, "why": "a worker or the driver died"}
                RunDir(job.storage).event("lost", f"{job.name}/training", **lost)
            job.storage.replace(job.log_path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        if self._active:
            self._job.storage.append(self._job.log_path, json.dumps(line) + "\n")


class _Watcher:
    """Shows the progress that rank 0 logs; the driver itself waits for the workers meanwhile."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="train-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        seen = len(read_json_lines(self._job.storage, self._job.log_path))
        progress: StageProgress | None = None
        stopped = False
        while not stopped:
            stopped = self._stop.wait(1.0)
            lines = read_json_lines(self._job.storage, self._job.log_path)
            if progress is None and lines:
                progress = StageProgress(f"{self._job.name}/training", lines[-1]["of"], "steps", done=seen).__enter__()
            if progress is not None:
                for line in lines[seen:]:
                    progress.advance(1, line["tokens"])
                if lines[seen:]:
                    gauges.set_all(self._job.storage.name, gauges.of_step(lines[-1]))
                seen = max(seen, len(lines))
        if progress is not None:
            progress.__exit__(None, None, None)
