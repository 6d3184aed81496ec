"""The SPIN loop. A second call finishes what is missing.

prompts ─> [sft] ─> θ_0 ─┐
                         v
   ┌──────────> θ_t answers prompts and held-out prompts ─> evaluate θ_t ─> LATEST
   │                     │
   │                   pairs ─> reference scores ─> train ─> θ_{t+1}
   └─────────────────────────────────────────────────────────┘
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import Start
from spin_ray.inputs.graders import graders_of
from spin_ray.inputs.model_folder import ModelFolder, open_artefact
from spin_ray.loop import probe
from spin_ray.loop.algorithms.base import Algorithm, Turn
from spin_ray.loop.algorithms.prepare import prepare_training
from spin_ray.loop.algorithms.table import find_algorithm, imported_by_workers
from spin_ray.loop.stages import evaluation
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.generation.shards import Job
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.loop.stages.prompts.stage import RowsOf
from spin_ray.loop.stages.training import stage as training
from spin_ray.report.grading import check_answers, check_on_workers
from spin_ray.report.history import evidence_to_stop
from spin_ray.report.measures import Evaluation
from spin_ray.report.model_card import write_card
from spin_ray.report.probe import should_stop
from spin_ray.report.progress import RunProgress
from spin_ray.report.tracking import track
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.connect import connect
from spin_ray.runtime.engine import EngineSpec, GenerationEngine, StartEngine
from spin_ray.runtime.imports import check_imports
from spin_ray.runtime.model_sharing import share
from spin_ray.runtime.placement import room_for

logger = logging.getLogger(__name__)

Play = Callable[[ModelFolder, list[Job]], None]


def spin(run: RunDir, config: SpinConfig, start: Start, start_engine: StartEngine) -> None:
    """Runs Algorithm 1 of arXiv 2401.01335, or another ``algorithm``."""
    with _working(run, config, start):
        start = _for_every_machine(start)
        initial = _prepare(run, config, start)
        play = _player(run, start, start_engine)
        if config.probe and run.latest() is None:
            found = probe.run(run, config, initial, play)
            for sentence in (*found["sentences"], *found["cautions"]):
                logger.warning("probe: %s", sentence)
            if should_stop(config, found):
                logger.warning("stopping before iteration 0, as probe.stop says")
                return
        _spin(run, config, start, initial, partial(play, config))


def look(run: RunDir, config: SpinConfig, start: Start, start_engine: StartEngine) -> dict[str, Any]:
    """Makes prompts and θ_0, and returns the findings of a probe."""
    with _working(run, config, start):
        start = _for_every_machine(start)
        return probe.run(run, config, _prepare(run, config, start), _player(run, start, start_engine))


@contextmanager
def _working(run: RunDir, config: SpinConfig, start: Start) -> Iterator[None]:
    connect(config)
    with room_for(config):
        check_on_workers(graders_of(config), config.generation.start_timeout_s, start.graded)
        check_imports(imported_by_workers(config), config.generation.start_timeout_s)
        with RunProgress(run, config, find_algorithm(config.algorithm)):
            yield


def _player(run: RunDir, start: Start, start_engine: StartEngine) -> probe.Play:
    def play(config: SpinConfig, model: ModelFolder, jobs: list[Job]) -> None:
        generation.run(run, config, _engine_spec(config, start, model), jobs, _Fetching(model, start_engine))

    return play


def _prepare(run: RunDir, config: SpinConfig, start: Start) -> ModelFolder:
    _prepare_prompts(run, config, start)
    _warn_of_idle_engines(run, config)
    find_algorithm(config.algorithm).check_rows(run, config)
    check_answers(run, config)
    if not config.sft:
        return start.model
    training.run_sft(run, config, start.model)
    return open_artefact(run.model(0), iterate_name(0), start.model)


def _spin(run: RunDir, config: SpinConfig, start: Start, initial: ModelFolder, play: Play) -> None:
    algorithm = find_algorithm(config.algorithm)
    opponent, previous, evaluations = initial, None, []
    for iteration in range(config.iterations + 1):
        if iteration > 0:
            opponent = open_artefact(run.model(iteration), iterate_name(iteration), initial)
        turn = Turn(
            run=run, config=config, start=start, iteration=iteration, opponent=opponent, initial=initial, play=play
        )
        play(opponent, _jobs(turn, algorithm))
        if start.heldout:
            trained = algorithm.objective(config, iteration - 1) if iteration else None
            evaluations.append(evaluation.run(run, config, iteration, opponent, previous, initial, trained))
        run.publish(iteration)
        write_card(run, iteration)
        track(run, config, iteration)
        if _should_stop(run, config, evaluations):
            break
        if iteration < config.iterations:
            training.run(run, config, iteration, opponent, prepare_training(turn, algorithm))
        previous = opponent


def _for_every_machine(start: Start) -> Start:

    def offered(model: ModelFolder) -> ModelFolder:
        return replace(model, source=share(model.path, model.files))

    return replace(start, model=offered(start.model), scorer=offered(start.scorer) if start.scorer else None)


def _prepare_prompts(run: RunDir, config: SpinConfig, start: Start) -> None:
    tokenizer = str(start.model.path)
    if start.heldout:
        prompts.run(run, config, tokenizer, RowsOf.held_out(run, config, start.heldout))
    leaks = (run.heldout_ids if run.heldout_ids.is_committed else run.heldout) if start.heldout else None
    prompts.run(run, config, tokenizer, RowsOf.training(run, config, start.train, without=leaks))
    if start.questions:
        questions = RowsOf(
            target=run.questions, given=start.questions, setting="data.questions", max_rows=config.data.max_rows,
            labelled=False,
        )  # fmt: skip
        prompts.run(run, config, tokenizer, questions)


def _warn_of_idle_engines(run: RunDir, config: SpinConfig) -> None:
    """Warns if an iteration's answers make fewer shards than there are engines. A run that has begun keeps its own."""
    played, settings = find_algorithm(config.algorithm).plays(run), config.generation
    if played is None or not played.is_committed:
        return
    rows, samples = played.manifest().rows, settings.samples_per_prompt
    rows = min(rows, config.data.prompts_per_iteration or rows)
    shards = ceil(rows / max(1, settings.shard_rows // samples))
    if shards < min(rows, settings.replicas) and not run.begun_config():
        logger.warning(
            "generation.shard_rows: %d answers make %d shards for %d engines, so that %d of these have nothing to do; "
            "set generation.shard_rows to %d or less",
            rows * samples, shards, settings.replicas, settings.replicas - shards,
            max(1, rows // settings.replicas) * samples,
        )  # fmt: skip


def _should_stop(run: RunDir, config: SpinConfig, evaluations: list[Evaluation]) -> bool:
    evidence = evidence_to_stop(config, evaluations)
    if evidence is None:
        return False
    stopped = evaluations[-1]["iterate"]
    if not any((event["event"], event["folder"]) == ("stop", stopped) for event in run.events()):
        logger.warning("stopping after %s: %s", stopped, evidence["reason"])
        run.event("stop", stopped, **evidence)
    return True


def _jobs(turn: Turn, algorithm: Algorithm) -> list[Job]:
    """Returns all jobs of the opponent, for one start of its engines."""
    run, opponent = turn.run, turn.opponent
    jobs = []
    if run.heldout.is_committed:
        target = run.heldout_samples(turn.iteration)
        jobs.append(Job(run.heldout, target, opponent, samples=turn.config.evaluation.samples))
    jobs += _examples(turn)
    played = algorithm.plays(run) if turn.iteration < turn.config.iterations else None
    if played:
        target, rows = run.generations(turn.iteration), turn.rows_of(played)
        audit = run.audit_path(turn.iteration)
        jobs.append(Job(played, target, opponent, rows, audit=audit))
    return jobs


def _examples(turn: Turn) -> Iterator[Job]:
    run, opponent, evaluation = turn.run, turn.opponent, turn.config.evaluation
    if run.heldout.is_committed and evaluation.examples:
        sampling = turn.config.generation.sampling
        rows = np.arange(min(evaluation.examples, run.heldout.manifest().rows))
        yield Job(
            prompts=run.heldout,
            target=run.examples(turn.iteration),
            model=opponent,
            rows=rows,
            samples=1,
            sampling=sampling.model_copy(update={"temperature": evaluation.examples_temperature}),
        )


@dataclass(frozen=True)
class _Fetching:
    model: ModelFolder
    start_engine: StartEngine

    def __call__(self, spec: EngineSpec) -> GenerationEngine:
        folder, adapter = self.model.parts_here()
        return self.start_engine(replace(spec, model=folder, adapter=adapter))


def _engine_spec(config: SpinConfig, start: Start, opponent: ModelFolder) -> EngineSpec:
    return EngineSpec(
        model=opponent.whole.path,
        max_length=config.model.max_length,
        stop_token_id=start.end_of_turn_id,
        other_stop_ids=start.other_ends,
        threads=config.generation.resources.threads,
        config=config.resolve_dtype(config.generation.engine),
        gpus=config.generation.resources.gpus,
        start_timeout_s=config.generation.start_timeout_s,
        trust_remote_code=config.model.trust_remote_code,
        adapter_rank=config.train.lora.rank if config.train.lora and config.commits_adapters else None,
    )
