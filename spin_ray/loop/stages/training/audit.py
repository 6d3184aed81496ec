"""Audit of the engine: did the model that is trained write the opponent's responses?

Engines compute some families in another way than transformers, from the same folder. The responses are then another
model's, and no measure of the training shows it: log p under the reference is the trained model's own.
"""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from spin_ray.errors import HealthError, RunDirError, first_line
from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.step import pair_lengths, plan, score_rows
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.run_dir.schemas import PAIR_SCHEMA, TOKEN_IDS
from spin_ray.run_dir.storage import table_from_bytes


def audit_engine(job: TrainJob, backend: TrainBackend) -> dict[str, float]:
    """Compares log p of a few responses, by the engine that wrote them and by the backend, which must still hold θ_t.

    Returns ``engine_difference``, the sum of |difference| over responses a token, in nats. Empty: nothing was audited.

    Raises:
        HealthError: it is above ``health.max_engine_difference``; raised on every rank.
        RunDirError: the file of the responses is damaged.
    """
    found = _read(job)
    if found is None or not found.num_rows:
        return {}
    rows, shape = _as_pairs(found), replace(job.shape, global_batch_pairs=found.num_rows)
    steps = plan(pair_lengths([rows]), shape, epochs=1, seed=0, ranks=shape.place()[1])[0]
    own, logps, _ = score_rows(backend, steps, rows, shape)
    lengths, told = pc.list_value_length(found["token_ids"]).to_numpy(), found["engine_logp"].to_numpy()
    apart = sum(abs(logp - told[row]) for row, logp in zip(own, logps, strict=True))
    sums = torch.tensor([apart, float(lengths[own].sum())], dtype=torch.float64).to(backend.device, torch.float32)
    dist.all_reduce(sums)
    difference = float(sums[0] / sums[1])
    limit = job.health.max_engine_difference
    if limit is not None and not difference <= limit:
        raise HealthError(
            "stopped before step 0: the engine that wrote y′ and the model that is trained give them log p that differ "
            f"by {difference:.2g} nats a token ({found.num_rows} responses), more than health.max_engine_difference "
            f"{limit:g}: the opponent is another model. See docs/models.md for the family; generation.engine.extra "
            "(hf_overrides, quantization) changes what vLLM computes, null switches the limit off"
        )
    return {"engine_difference": round(difference, 5)}


def _read(job: TrainJob) -> pa.Table | None:
    if job.audit is None:
        return None
    try:
        return table_from_bytes(job.storage.read(job.audit))
    except FileNotFoundError:  # an older run
        return None
    except pa.ArrowInvalid as error:
        where = job.storage.where(job.audit)
        raise RunDirError(f"{where}: is damaged ({first_line(error)}); remove it to go on without the audit") from error


def _as_pairs(audited: pa.Table) -> pa.Table:
    """Returns PAIR_SCHEMA rows without y′, each of a prompt of its own."""
    names = [str(number) for number in range(audited.num_rows)]
    empty = pa.array([[]] * audited.num_rows, TOKEN_IDS)
    columns = [names, names, pa.array([0] * audited.num_rows, pa.int32()), audited["prompt_ids"], audited["token_ids"]]
    return pa.table([*columns, empty], schema=PAIR_SCHEMA)
