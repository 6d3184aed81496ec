"""Training of θ_{t+1} from θ_t, and supervised fine-tuning."""

from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.config.sections import OptimizerConfig, SftConfig
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import open_renderer, read_template
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.step import Objective, PackShape
from spin_ray.loop.stages.training import checkpoint
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.loop.stages.training.log import Watcher
from spin_ray.loop.stages.training.worker import work
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.workers import run_workers


def run(run_dir: RunDir, config: SpinConfig, iteration: int, opponent: ModelFolder, objective: Objective) -> None:
    """Trains θ_{t+1} from θ_t; commits ``iter_NNN/model``, or ``iter_NNN/adapter`` with ``train.lora.merge: false``.

    Without merging, each iteration trains θ_t's adapter further on the frozen θ_0. That adapter is also the reference,
    so margins start at exactly 0. With merging, each iteration trains a new adapter on the weights of θ_t.

    Raises:
        ConfigError: the loss, optimizer or backend does not exist.
        HealthError: a health limit was crossed.
        StageError: the workers failed too often; the same command resumes.
    """
    values = config.at(iteration)
    base, wins = run_dir.base_scores(iteration), run_dir.wins(iteration)
    lora, loss = config.train.lora, objective.resolve()
    target = run_dir.adapter(iteration + 1) if config.commits_adapters else run_dir.whole_model(iteration + 1)
    job = TrainJob(
        storage=run_dir.storage,
        start=opponent,
        rows=run_dir.pairs(iteration),
        reference=run_dir.reference(iteration) if loss.needs_reference or loss.needs_wins else None,
        base=base if loss.needs_reference and config.mixes_references(iteration) else None,
        wins=wins if loss.needs_wins else None,
        audit=run_dir.audit_path(iteration) if run_dir.generations(iteration).is_committed else None,
        teacher_rows=run_dir.teacher_rows(iteration) if objective.top_k else None,
        teacher=run_dir.teacher(iteration) if objective.top_k else None,
        reference_alpha=config.objective.reference_alpha,
        target=target,
        objective=objective,
        shape=PackShape(
            pack_length=config.train.pack_length,
            global_batch_pairs=config.train.global_batch_pairs,
            pad_id=opponent.pad_id,
        ),
        backend=replace(
            _backend_settings(config, config.train.optimizer, values.learning_rate),
            lora=lora,
            base_name=_base_name(run_dir, config, opponent),
        ),
        recipe=config,
        epochs=values.epochs,
        schedule_epochs=values.schedule_epochs,
        seed=config.seed + iteration,
        chat_template=_chat_template(config),
    )
    _train(run_dir, config, job)


def _base_name(run_dir: RunDir, config: SpinConfig, opponent: ModelFolder) -> str:
    """Returns the name by which PEFT finds the frozen model, on the hub or as a folder."""
    if config.sft:
        return run_dir.storage.where(run_dir.whole_model(0).path)
    path = str(opponent.whole.path)
    is_pinned = config.model.revision is not None or "@" in config.model.path  # the bare name would mean the newest
    from_hub = "snapshots" in path and not Path(config.model.path).expanduser().exists()
    return config.model.path if from_hub and not is_pinned else path


def run_sft(run_dir: RunDir, config: SpinConfig, start: ModelFolder) -> None:
    """Trains θ_0 from the start model and commits ``sft/model``."""
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
    """Fine-tunes ``start`` on prompts, or on pairs without y′, and commits ``target``."""
    job = TrainJob(
        storage=run_dir.storage,
        start=start,
        rows=rows,
        target=target,
        objective=Objective(loss=None),
        shape=PackShape(
            pack_length=config.train.pack_length, global_batch_pairs=how.global_batch_rows, pad_id=start.pad_id
        ),
        backend=replace(_backend_settings(config, how.optimizer, how.learning_rate), base="bf16"),
        recipe=config.model_copy(update={"train": config.train.model_copy(update={"lora": None})}),  # all weights
        epochs=how.epochs,
        seed=config.seed,
        chat_template=_chat_template(config),
    )
    _train(run_dir, config, job)


def _chat_template(config: SpinConfig) -> str | None:
    path = config.model.chat_template
    return read_template(path) if path else None


def _backend_settings(config: SpinConfig, optimizer: OptimizerConfig, learning_rate: float) -> BackendSettings:
    return replace(
        BackendSettings.for_scoring(config),
        kind=config.train.backend,
        gradient_checkpointing=config.train.gradient_checkpointing is True,
        sharding=config.train.sharding,
        reduce_every_pack=config.train.reduces_every_pack,
        optimizer=optimizer,
        learning_rate=learning_rate,
    )


def _train(run_dir: RunDir, config: SpinConfig, job: TrainJob) -> None:
    if job.target.already_made(job.inputs(), job.settings()):
        _let_go(run_dir, config, job)  # a driver that was killed may have left them
        return
    start = str(job.start.whole.here(weights=False))
    job = replace(job, end_of_turn_id=open_renderer(start, config.model, run_dir.date()).end_of_turn_id)
    name, earlier = digest([job.inputs(), job.settings()])[:16], job.logged()
    checkpoint.refuse_other_settings(job, name)
    stage = f"{job.name}/training"
    with run_dir.stage(stage) as counted:
        with Watcher(job):
            counted |= run_workers(
                work,
                job,
                config,
                name,
                run_dir.storage.where(job.checkpoints),
                prepare=lambda: checkpoint.mend_snapshot(run_dir.storage, f"{job.checkpoints}/{name}"),
                progress=lambda: run_dir.storage.find(job.log_path),
                warn=partial(run_dir.warn, stage),
            )
        own = _added(earlier, job.logged())
        counted |= {"steps": len(own), "tokens": sum(line["tokens"] for line in own)}
        counted |= {"work_s": counted["work_s"] + sum(line["seconds"] for line in own)}
        counted |= {"rows": job.rows.manifest().rows}
        _let_go(run_dir, config, job)


def _let_go(run_dir: RunDir, config: SpinConfig, job: TrainJob) -> None:
    if not config.storage.keep_checkpoints and run_dir.storage.entries(job.checkpoints):
        run_dir.storage.delete(job.checkpoints)


def _added(earlier: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of a log after those that it had before."""
    return now[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(earlier, now, strict=False))) :]
