"""Audit of the engine: does it compute the same model as the backend?

Engines compute some model families otherwise than transformers, and no measure of the training shows it.
"""

import logging
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from spin_ray.errors import HealthError, RunDirError
from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.step import pair_lengths, plan, score_rows
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.run_dir.schemas import AUDIT_SCHEMA, pairs_of
from spin_ray.run_dir.storage import table_from_bytes

logger = logging.getLogger(__name__)

_DAMAGED = -1


def audit_engine(job: TrainJob, backend: TrainBackend) -> dict[str, float]:
    """Compares log p of a few responses by the engine and by the backend, which must still hold θ_t.

    Returns ``engine_difference``: |difference| of log p, summed over responses, in nats per token, if any.

    Raises:
        HealthError: it is not finite, or above ``health.max_engine_difference`` without a quantised base; raised on
            every rank.
        RunDirError: the file of the responses is damaged; raised on every rank.
    """
    found = _read(job)
    least = torch.tensor(_DAMAGED if found is None else found.num_rows, device=backend.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)  # if one rank cannot read the file, no rank scores it
    if least == _DAMAGED:
        raise RunDirError(f"{job.storage.where(job.audit or '')}: is damaged; remove it to go on without the audit")
    if found is None or not least:
        return {}
    rows, shape = _as_pairs(found), replace(job.shape, global_batch_pairs=found.num_rows)
    steps = plan(pair_lengths([rows]), shape, epochs=1, seed=0, ranks=shape.place()[1])[0]
    own, logps, _ = score_rows(backend, steps, rows, shape)
    lengths, told = pc.list_value_length(found["token_ids"]).to_pylist(), found["engine_logp"].to_pylist()
    apart = sum(abs(logp - told[row]) for row, logp in zip(own, logps, strict=True))
    sums = torch.tensor([apart, float(sum(lengths[row] for row in own))], device=backend.device)
    dist.all_reduce(sums)
    difference = float(sums[0] / sums[1])
    _check(job, difference, found.num_rows)
    return {"engine_difference": round(difference, 5)} if math.isfinite(difference) else {}  # JSON has no NaN


def _check(job: TrainJob, difference: float, responses: int) -> None:
    lora, limit = job.backend.lora, job.recipe.health.max_engine_difference
    is_rounded = lora is not None and lora.is_quantised  # the engine's weights are not rounded
    if limit is None or difference <= limit or (is_rounded and math.isfinite(difference)):
        return
    raise HealthError(
        f"{job.name}: the engine that wrote y′ and the model that is trained give them log p that differ by "
        f"{difference:.2g} nats a token ({responses} responses), more than health.max_engine_difference {limit:g}: the "
        "opponent is another model than θ_t. docs/models.md names families that vLLM reads otherwise; change what it "
        "computes by generation.engine.extra (hf_overrides, quantization) in a new run folder, or set the limit to null"
    )


def _read(job: TrainJob) -> pa.Table | None:
    """Returns AUDIT_SCHEMA rows, or None for a damaged file.

    The table is empty if nothing was audited, or if a damaged file was removed.
    """
    data = job.storage.find(job.audit) if job.audit else None
    if data is None:
        if job.audit and dist.get_rank() == 0:
            logger.warning("%s: is missing; the engine is not audited", job.storage.where(job.audit))
        return AUDIT_SCHEMA.empty_table()
    try:
        return table_from_bytes(data)
    except (pa.ArrowException, OSError):
        return None


def _as_pairs(audited: pa.Table) -> pa.Table:
    names = [str(number) for number in range(audited.num_rows)]
    return pairs_of(names, 0, names, audited["prompt_ids"], audited["token_ids"])
