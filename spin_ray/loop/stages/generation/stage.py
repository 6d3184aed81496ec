"""Generation of y′ ~ p_θt(·|x) for every prompt x, by Ray Data actors with an engine each.

Each shard is committed when it is done. Each response has its own seed, so a retry gives the same tokens.
"""

import hashlib
import logging
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError, UserError, is_of_dead_process, last_line, memory_advice, user_error_in
from spin_ray.loop.stages.generation import failures
from spin_ray.loop.stages.generation.shards import Job, Shard, cut_into_shards, find_parts, row_count
from spin_ray.report.progress import StageProgress
from spin_ray.run_dir.artefact import FileEntry, seal
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import AUDIT_SCHEMA, GENERATION_SCHEMA
from spin_ray.run_dir.storage import Storage, table_to_bytes
from spin_ray.runtime.actors import map_by_actors
from spin_ray.runtime.engine import Completion, EngineSpec, GenerationEngine, StartEngine, VllmEngine
from spin_ray.runtime.engine_groups import EngineGroups
from spin_ray.runtime.garbage import collect_as_usual
from spin_ray.runtime.waiting import wait_until_free, with_deadline

logger = logging.getLogger(__name__)

_AUDITED = 16
"""Audited responses per job."""
_USE_LESS = (
    "lower generation.engine.cpu_kv_cache_gib or gpu_memory_utilization, generation.engine.max_num_seqs, or "
    "generation.replicas"
)


def run(
    run_dir: RunDir,
    config: SpinConfig,
    spec: EngineSpec,
    jobs: list[Job],
    start_engine: StartEngine = VllmEngine,
) -> None:
    """Answers the prompts of all jobs with one set of engines.

    Raises:
        RunDirError: a shard was made by another opponent or recipe.
        StageError: no engine started, or none finished a shard, in time.
    """
    jobs = [job for job in jobs if not job.target.already_made(job.inputs(), job.settings(config))]
    if not jobs:
        return
    shards = [shard for job in jobs for shard in cut_into_shards(job, config)]
    found = {job.target.path: find_parts(job, config) for job in jobs}
    entries = {path: parts.whole for path, parts in found.items()}
    missing = [shard for shard in shards if shard.name not in entries[shard.target.path]]
    names = " + ".join(job.target.path for job in jobs)
    cut_off = run_dir.was_cut_off(names)
    with run_dir.stage(names) as counted:
        if cut_off and missing:
            run_dir.event(
                "lost", names, shards=min(config.generation.replicas, len(missing)), why="the stage ended early"
            )
        done = sum(entry.rows or 0 for whole in entries.values() for entry in whole.values())
        total = sum(row_count(job) * job.samples_each(config) for job in jobs)
        tokens, work_s = 0, 0.0
        with StageProgress(names, total, "rows", done=done) as progress:
            for report in _play(missing, config, spec, start_engine):
                entries[report["target"]][report["name"]] = FileEntry(**report["entry"])
                if report["lost"]:
                    told = failures.take(job.target for job in jobs)
                    why = f"an engine died ({told})" if told else "an engine died"
                    run_dir.warn(names, f"{why}; another one does its shard")
                    run_dir.event("lost", names, shards=report["lost"], why=why)
                tokens += report["tokens"]
                work_s += report["seconds"] / config.generation.replicas
                progress.advance(report["entry"]["rows"], report["tokens"])
        for job in jobs:
            job.target.commit(entries[job.target.path], job.inputs(), job.settings(config))
        counted |= {"rows": total, "tokens": tokens, "work_s": work_s, "shards_found": len(shards) - len(missing)}
        if damaged := sum(parts.damaged for parts in found.values()):
            counted["shards_damaged"] = damaged


def row_seed(seed: int, opponent: str, prompt_id: str, sample: int) -> int:
    """Returns a response's 63-bit seed, independent of its shard."""
    identity = f"{seed}/{opponent}/{prompt_id}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") >> 1


def _play(
    shards: list[Shard], config: SpinConfig, spec: EngineSpec, start_engine: StartEngine
) -> Iterator[dict[str, Any]]:
    if not shards:
        return
    wait_until_free(config, "generation", "generation")
    resources, engine = config.generation.resources, config.generation.engine
    with EngineGroups(resources, engine.devices) as groups:
        spread = engine.pipeline_parallel_size > 1
        played = map_by_actors(
            [{"shard": pickle.dumps(shard)} for shard in shards],
            _Player,
            (spec, config, start_engine),
            groups.actor if spread else resources,
            replicas=config.generation.replicas,
            restarts=config.generation.max_failures,
            place=groups.place if spread else dict,
        )
        yield from _finished(played, shards, config)


def _finished(played: ray.data.Dataset, shards: list[Shard], config: SpinConfig) -> Iterator[dict[str, Any]]:
    first_s = config.generation.start_timeout_s + config.generation.shard_timeout_s
    try:
        for row in with_deadline(played.iter_rows(), first_s, config.generation.shard_timeout_s, "a generation shard"):
            yield row["finished"]
    except ray.exceptions.RayError as error:
        if found := user_error_in(error):
            raise found from error
        told = failures.take(dict.fromkeys(shard.target for shard in shards))
        if told and is_of_dead_process(error):
            said, advice = told, memory_advice(told, _USE_LESS)
        else:
            said, advice = last_line(error), memory_advice(error, _USE_LESS)
            said += f" (an engine before it: {told})" if told not in said else ""
        raise StageError(
            f"generation failed: {said}{advice}; committed shards are kept, run the command again"
        ) from error


class _Player:
    def __init__(self, spec: EngineSpec, config: SpinConfig, start_engine: StartEngine) -> None:
        self._spec, self._start_engine, self._config = spec, start_engine, config
        self._unusable: Exception | None = None
        try:
            self._engine = start_engine(spec)
        except Exception as error:  # Ray would take an error here for a dead actor and try again
            self._unusable = error
        collect_as_usual()
        # A process that replaces a killed one reports the loss.
        self._lost = int(ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if self._unusable:
            raise self._unusable
        shard: Shard = pickle.loads(item["shard"])  # noqa: S301 (from this run's driver, through Ray)
        started = time.monotonic()
        answers = self._answer(shard)
        seconds = time.monotonic() - started
        lost, self._lost = self._lost, 0
        entry = shard.target.write_part(shard.name, answers)
        tokens = pc.sum(pc.list_value_length(answers["token_ids"])).as_py()
        return {
            "finished": {
                "target": shard.target.path,
                "name": shard.name,
                "entry": entry.model_dump(),
                "tokens": tokens,
                "seconds": seconds,
                "lost": lost,
            }
        }

    def _answer(self, shard: Shard) -> pa.Table:
        """Answers a shard, with a new engine if the engine fails.

        On GPUs the process ends instead, because later CUDA calls may fail too. Ray restarts it with the same shard.
        """
        failed = 0
        while True:
            try:
                return answer(shard, self._config, self._engine)
            except (UserError, StageError):
                raise
            except Exception as error:
                failures.tell(shard.target, error)
                if self._config.generation.resources.gpus:
                    logger.exception("%s: the engine failed; this process ends with it", shard.name)
                    _end_process()
                failed += 1
                if failed > self._config.generation.max_failures:
                    raise
                logger.warning("%s: the engine failed (%s); a new one is started", shard.name, last_line(error))
                self._lost += 1
                with suppress(Exception):
                    self._engine.close()
                self._engine = self._start_engine(self._spec)


def _end_process() -> None:
    """Ends the process so that Ray restarts the actor. ``ray.actor.exit_actor`` would end it for good."""
    logging.shutdown()
    os._exit(1)


def _write_audit(storage: Storage, path: str, prompts: list[list[int]], completions: list[Completion]) -> None:
    rows = [
        {"prompt_ids": prompt, "token_ids": completion.token_ids, "engine_logp": completion.logp}
        for prompt, completion in zip(prompts, completions, strict=True)
        if completion.logp is not None and completion.token_ids
    ]
    storage.replace(path, table_to_bytes(pa.Table.from_pylist(rows, AUDIT_SCHEMA)))


def answer(shard: Shard, config: SpinConfig, engine: GenerationEngine) -> pa.Table:
    """Returns GENERATION_SCHEMA rows in the order of the prompts, and writes the shard's audit."""
    prompts = shard.read_prompts()
    samples = shard.samples
    ids = [prompt_id for prompt_id in prompts["prompt_id"].to_pylist() for _ in range(samples)]
    numbers = [number for _ in range(prompts.num_rows) for number in range(samples)]
    opponent = shard.opponent
    seeds = [row_seed(config.seed, opponent, prompt_id, number) for prompt_id, number in zip(ids, numbers, strict=True)]
    token_ids = [row for row in prompts["prompt_ids"].to_pylist() for _ in range(samples)]
    completions = engine.generate(token_ids, shard.sampling, seeds, audited=_AUDITED if shard.audit else 0)
    if shard.audit:
        _write_audit(shard.target.storage, shard.audit, token_ids, completions)
    table = pa.table(
        [
            ids,
            numbers,
            [opponent] * len(ids),
            [completion.token_ids for completion in completions],
            [completion.finish_reason for completion in completions],
            seeds,
        ],
        schema=GENERATION_SCHEMA,
    )
    return seal(table, shard.fingerprint)
