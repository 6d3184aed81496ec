"""The SPIN loop. A function of storage: run it again and it finishes what is missing.

prompts ─> [sft] ─> θ_0 ─┐
v
┌──────────> θ_t answers prompts and held-out prompts ─> evaluate θ_t ─> LATEST
│                     │
│                   pairs ─> reference scores ─> train ─> θ_{t+1}
└─────────────────────────────────────────────────────────┘
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_ray.config import SpinConfig
from spin_ray.engine import EngineSpec
from spin_ray.history import read_evaluations
from spin_ray.lease import Lease
from spin_ray.measures import Evaluation, stop_evidence
from spin_ray.model_folder import ModelFolder
from spin_ray.preflight import Start, check_recipe
from spin_ray.resources import check_fits, connect
from spin_ray.run_dir import RunDir, folder_digest, iterate_name
from spin_ray.stages import evaluation, generation, pairs, prompts, training
from spin_ray.storage import Storage
from spin_ray.tracking import track

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind."""

    run: RunDir
    model: Path
    """The last iterate, a Hugging Face folder."""
    evaluations: list[dict[str, Any]]
    """``eval.json`` of θ_0, θ_1, …; empty without held-out data."""


def run_spin(config: SpinConfig, out: str | Path) -> RunResult:
    """Runs SPIN (Algorithm 1 of arXiv 2401.01335) in the folder ``out``, or finishes what an earlier call left undone.

    Raises:
        UserError: the recipe, data, model, cluster or folder cannot be used; the message says what to do.
        StageError: a stage failed; the same call goes on from what is committed.
    """
    storage = Storage(out)
    with Lease(storage, config.storage.lease_timeout_s) as lease:
        start = check_recipe(config)
        run = RunDir(storage)
        run.begin(config, start.facts())
        if is_finished(run, config):
            logger.info("%s: nothing left to do", storage.root)
        else:
            connect(config)
            check_fits(config)
        return _spin(run, config, start, lease)


def _spin(run: RunDir, config: SpinConfig, start: Start, lease: Lease) -> RunResult:
    tokenizer = str(start.model.path)
    prompts.run(run, config, run.prompts, start.train, tokenizer, config.data.max_rows)
    if start.heldout:
        prompts.run(run, config, run.heldout, start.heldout, tokenizer, config.evaluation.max_rows)
    if config.sft:
        training.run_sft(run, config, start.model)

    evaluations = []
    player, opponent = start.model, None
    for iteration in range(config.iterations + 1):
        lease.check()
        if iteration > 0 or config.sft:
            player = _open_iterate(run, iteration, start.model.pad_id)
        generation.run(run, config, _engine_spec(config, start, player), _jobs(run, config, iteration, player))
        if start.heldout:
            evaluations.append(evaluation.run(run, config, iteration, player, opponent))
        run.publish(iteration)
        track(run, config, iteration)
        if _should_stop(run, config, evaluations):
            break
        if iteration < config.iterations:
            pairs.run(run, config, iteration)
            training.run(run, config, iteration, player)
        opponent = player
    return RunResult(run, player.path, evaluations)


def _should_stop(run: RunDir, config: SpinConfig, evaluations: list[Evaluation]) -> bool:
    """Applies ``stop_when``; the evidence goes to events.jsonl, once."""
    rule = config.stop_when
    evidence = stop_evidence(evaluations, rule.patience, rule.min_fall) if rule else None
    if evidence is None:
        return False
    stopped = evaluations[-1]["iterate"]
    if not any((event["event"], event["stage"]) == ("stop", stopped) for event in run.events()):
        logger.warning("stopping after %s: %s", stopped, evidence["reason"])
        run.event("stop", stopped, **evidence)
    return True


def _jobs(run: RunDir, config: SpinConfig, iteration: int, player: ModelFolder) -> list[generation.Job]:
    """What θ_t answers with one start of the engines: held-out prompts, and those of iteration t if there is one."""
    jobs = []
    if run.heldout.is_committed:
        jobs.append(generation.Job(run.heldout, run.heldout_samples(iteration), player.name, player.digest))
    if iteration < config.iterations:
        rows = generation.prompt_slice(
            run.prompts.manifest().rows, config.data.prompts_per_iteration, iteration, config.seed
        )
        jobs.append(generation.Job(run.prompts, run.generations(iteration), player.name, player.digest, rows))
    return jobs


def _open_iterate(run: RunDir, iterate: int, pad_id: int) -> ModelFolder:
    """θ_iterate, after checking its files against their digests."""
    artefact = run.model(iterate)
    files = artefact.verify().files
    return ModelFolder(run.storage.path(artefact.path), folder_digest(files), iterate_name(iterate), pad_id)


def _engine_spec(config: SpinConfig, start: Start, player: ModelFolder) -> EngineSpec:
    return EngineSpec(
        model=player.path,
        max_length=config.model.max_length,
        stop_token_id=start.end_of_turn_id,
        threads=config.generation.resources.threads,
        config=config.generation.engine,
        trust_remote_code=config.model.trust_remote_code,
    )


def is_finished(run: RunDir, config: SpinConfig) -> bool:
    """Whether nothing is left to do, told without Ray."""
    evaluations = read_evaluations(run, config)
    if evaluations and run.latest() == evaluations[-1]["iterate"] and _should_stop(run, config, evaluations):
        return True
    last = config.iterations
    evaluated = config.data.heldout is None or run.storage.exists(run.eval_path(last))
    return run.model(last).is_committed and evaluated and run.latest() == iterate_name(last)
