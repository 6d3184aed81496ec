"""Log-probabilities of responses under one model after another, by the train workers."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.losses import pair_logps, response_logps
from spin_ray.learner.step import PackShape, feed, own_packs
from spin_ray.planning.mesh import mesh_of
from spin_ray.report.margins import SCORE_SCHEMA
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.workers import device, nodes_and_room, run_workers


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    recipe: SpinConfig
    tables: tuple[tuple[ModelFolder, pa.Table], ...]
    """Models with their PAIR_SCHEMA rows."""
    shape: PackShape
    backend: BackendSettings
    target: Artefact
    by_token: bool
    """False leaves the log-probabilities of tokens empty."""


def score(
    run_dir: RunDir,
    config: SpinConfig,
    target: Artefact,
    tables: tuple[tuple[ModelFolder, pa.Table], ...],
    inputs: dict[str, str],
    *,
    stage: str,
    by_token: bool = True,
) -> tuple[pa.Table, dict[str, float]]:
    """Scores each table of PAIR_SCHEMA rows under its model, and commits ``target``.

    Returns SCORE_SCHEMA rows, and counts of the work done by this call. Warnings are events of ``stage``.
    """
    settings = {
        "precision": config.train.precision,
        "pack_length": config.train.pack_length,
        "workers": config.train.workers,
    }
    work: dict[str, float] = {}
    if not target.already_made(inputs, settings):
        model, rows = tables[0]
        job = ScoreJob(
            recipe=config,
            tables=tables,
            shape=PackShape(
                pack_length=config.train.pack_length, global_batch_pairs=rows.num_rows, pad_id=model.pad_id
            ),
            backend=BackendSettings.for_scoring(config),
            target=target,
            by_token=by_token,
        )
        folder = f"{target.path.rpartition('/')[0]}/scoring"
        work = run_workers(
            _worker,
            job,
            config,
            f"scores-{model.digest[:16]}",
            run_dir.storage.where(folder),
            warn=partial(run_dir.warn, stage),
        )
        run_dir.storage.delete(folder)
        names = [part_name(rank) for rank in range(int(work.pop("ranks")))]
        target.commit({name: target.part_entry(name) for name in names}, inputs, settings)
    return pa.concat_tables(list(target.tables())), work


def _worker(job: ScoreJob) -> dict[str, float]:
    tables = []
    tokens, work_s = 0, 0.0
    mesh = mesh_of(job.recipe, job.tables[0][0].parts_here()[0], *nodes_and_room()).mesh
    settings, shape = replace(job.backend, mesh=mesh), replace(job.shape, tensor=mesh.tensor)
    for model, rows in job.tables:
        folder, adapter = model.parts_here()
        backend = Fsdp2Backend(folder, replace(settings, adapter=adapter), device())
        started = time.monotonic()
        scores, own = _score_rows(backend, rows, shape, model.name, by_token=job.by_token)
        tables.append(scores)
        work_s += time.monotonic() - started
        tokens += own
        backend.close()
    rank, ranks = shape.place()
    if shape.writes():
        job.target.replace_part(part_name(rank), pa.concat_tables(tables))
    of_all = torch.tensor(tokens, device=device())
    dist.all_reduce(of_all)  # the ranks also wait here for each other's parts
    return {"tokens": of_all.item() // shape.tensor, "work_s": work_s, "ranks": ranks}


def _score_rows(
    backend: Fsdp2Backend, table: pa.Table, shape: PackShape, model: str, *, by_token: bool
) -> tuple[pa.Table, int]:
    """Returns SCORE_SCHEMA rows of this rank's packs, and their tokens without padding."""
    rows: list[int] = []
    tokens = 0
    columns: dict[str, list[Any]] = {name: [] for name in SCORE_SCHEMA.names[2:]}
    for useful, batch in feed(own_packs(table, shape), table, shape, backend.device):
        tokens += useful
        logps = backend.score_tokens(batch)
        real, generated = pair_logps(response_logps(logps, batch.segment, batch.num_segments), batch)
        rows += batch.pair_row.tolist()
        columns["real_logp"] += real.tolist()
        columns["generated_logp"] += generated.tolist()
        of_tokens, segment = logps.cpu(), batch.segment.cpu()  # one copy for all responses
        for name, segments in (("real", batch.real_segment), ("generated", batch.generated_segment)):
            numbers = segments.tolist()
            own = [of_tokens[segment == number].tolist() for number in numbers] if by_token else [[]] * len(numbers)
            columns[f"{name}_token_logps"] += own
    pair_ids = table["pair_id"].take(pa.array(rows, pa.int64()))
    return pa.table([pair_ids, [model] * len(rows), *columns.values()], schema=SCORE_SCHEMA), tokens
