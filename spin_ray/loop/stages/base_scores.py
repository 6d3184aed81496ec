"""log p_0 of the pairs, for the geometric reference of α-SPIN.

Iteration 0 needs none, because its opponent is θ_0. Earlier scores are reused.
"""

from dataclasses import dataclass, replace

import pyarrow as pa
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.step import PackShape, pair_lengths, plan, score_rows
from spin_ray.planning.mesh import mesh_of
from spin_ray.run_dir.names import part_name, prompt_of
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, REFERENCE_SCHEMA
from spin_ray.run_dir.storage import ATTEMPTS, Storage, table_from_bytes, table_to_bytes
from spin_ray.runtime.workers import device, nodes_and_room, run_workers

_SCORED = pa.schema([pa.field("response", pa.string()), pa.field("logp", pa.float32())])
Scores = dict[str, float]
"""log p_0 in nats, of y by prompt id and of y′ by pair id."""


@dataclass(frozen=True, kw_only=True)
class BaseScoreJob:
    recipe: SpinConfig
    rows: pa.Table
    """PAIR_SCHEMA rows without y′. ``pair_id`` is the key in ``Scores``, ``real_ids`` the response."""
    model: ModelFolder
    shape: PackShape
    backend: BackendSettings
    storage: Storage
    target: str


def run(run_dir: RunDir, config: SpinConfig, iteration: int, base: ModelFolder) -> None:
    """Commits ``iter_NNN/base_scores`` of ``iteration`` ≥ 1.

    Raises:
        StageError: the workers failed too often.
    """
    pairs, target = run_dir.pairs(iteration), run_dir.base_scores(iteration)
    earlier = [run_dir.reference(0), *(run_dir.base_scores(number) for number in range(1, iteration))]
    inputs = {"pairs": pairs.manifest().digest, "base_model": base.digest}
    inputs |= {artefact.path: artefact.manifest().digest for artefact in earlier}
    settings = {"precision": config.train.precision, "pack_length": config.train.pack_length}
    if target.already_made(inputs, settings):
        return
    with run_dir.stage(target.path) as counted:
        rows = pa.concat_tables(list(pairs.tables()))
        known = known_scores(pa.concat_tables([table for artefact in earlier for table in artefact.tables()]))
        unknown = unknown_responses(rows, known)
        if unknown.num_rows:
            known |= _score(run_dir, config, base, unknown, f"{target.path}-{digest([inputs, settings])[:16]}")
        columns = [
            rows["pair_id"],
            *([known[key] for key in rows[name].to_pylist()] for name in ("prompt_id", "pair_id")),
        ]
        entry = target.replace_part(part_name(0), pa.table(columns, schema=REFERENCE_SCHEMA))
        counted |= {"rows": rows.num_rows, "responses_scored": unknown.num_rows}
        target.commit({part_name(0): entry}, inputs, settings, counts={"responses_scored": unknown.num_rows})


def known_scores(scores: pa.Table) -> Scores:
    known: Scores = {}
    for pair_id, real, generated in zip(*(scores[name].to_pylist() for name in REFERENCE_SCHEMA.names), strict=True):
        known[pair_id] = generated
        known.setdefault(prompt_of(pair_id), real)
    return known


def unknown_responses(pairs: pa.Table, known: Scores) -> pa.Table:
    """Returns each response without a score once, as a row without y′."""
    found = {}
    for row in pairs.to_pylist():
        for key, response in ((row["prompt_id"], row["real_ids"]), (row["pair_id"], row["generated_ids"])):
            if key not in known and key not in found:
                # A prompt id of its own, as equal prompt ids share one y in a pack.
                found[key] = row | {"pair_id": key, "prompt_id": key, "real_ids": response, "generated_ids": []}
    return pa.Table.from_pylist(list(found.values()), PAIR_SCHEMA)


def _score(run_dir: RunDir, config: SpinConfig, base: ModelFolder, rows: pa.Table, name: str) -> Scores:
    storage = run_dir.storage
    job = BaseScoreJob(
        recipe=config,
        rows=rows,
        model=base,
        shape=PackShape(pack_length=config.train.pack_length, global_batch_pairs=rows.num_rows, pad_id=base.pad_id),
        backend=BackendSettings.for_scoring(config),
        storage=storage,
        target=f"{ATTEMPTS}/{name}",
    )
    workers_folder = f"{ATTEMPTS}/{name}-workers"
    ranks = run_workers(_worker, job, config, name.replace("/", "-"), storage.where(workers_folder))
    parts = [table_from_bytes(storage.read(f"{job.target}/{part_name(rank)}")) for rank in range(ranks)]
    for folder in (job.target, workers_folder):
        storage.delete(folder)
    scored = pa.concat_tables(parts)
    return dict(zip(scored["response"].to_pylist(), scored["logp"].to_pylist(), strict=True))


def _worker(job: BaseScoreJob) -> int:
    folder, adapter = job.model.parts_here()
    mesh = mesh_of(job.recipe, folder, *nodes_and_room()).mesh
    shape = replace(job.shape, tensor=mesh.tensor)
    rank, ranks = shape.place()
    steps = plan(pair_lengths([job.rows]), shape, epochs=1, seed=0, ranks=ranks)[0]
    backend = Fsdp2Backend(folder, replace(job.backend, mesh=mesh, adapter=adapter), device())
    rows, logps, _ = score_rows(backend, steps, job.rows, shape)
    backend.close()
    keys = job.rows["pair_id"].take(pa.array(rows, pa.int64()))
    part = pa.table([keys, logps], schema=_SCORED)
    if shape.writes():
        job.storage.replace(f"{job.target}/{part_name(rank)}", table_to_bytes(part))
    dist.barrier()
    return ranks
