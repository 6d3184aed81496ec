"""The work of one train worker; knows torch.distributed, not Ray.

plan of all epochs -> score the first epoch's packs (reference) -> steps: forward, loss, backward, optimizer
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32
from torch import Tensor

from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.losses import (
    Loss,
    PairValues,
    geometric_reference,
    pair_logps,
    resolve_loss,
    segment_lengths,
    sft_loss,
)
from spin_ray.learner.metrics import StepSums, step_metrics
from spin_ray.learner.packing import Pack, PairLengths, Step, build_pack, plan_epoch

LENGTHS_OF_A_PACK = 16
"""Number of pack lengths: new shapes cost oneDNN kernels, padding costs compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The quantity that a step minimises.

    A loss per pair adds ``sft_weight`` times the mean of −log p(y) over human response tokens.
    """

    loss: str | None
    """Name or import path; None is SFT."""
    beta: float = 1.0
    sft_weight: float = 0.0
    length_normalised: bool = False
    """True: a loss per pair takes log-probabilities per token, unlike the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackShape:
    pack_length: int
    global_batch_pairs: int
    pad_id: int

    def build(self, pack: Pack, table: pa.Table) -> PackedBatch:
        """Returns the tensors of a pack, no longer than need be."""
        multiple = -(-self.pack_length // LENGTHS_OF_A_PACK)
        return build_pack(pack, table, pack_length=self.pack_length, pad_id=self.pad_id, pad_multiple=multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScores:
    """log p_ref of both responses, in nats, in table order."""

    real: Float32[Tensor, "rows"]
    generated: Float32[Tensor, "rows"]
    real_win: Float32[Tensor, "rows"] | None = None
    """Estimate of P(the response beats one of the reference)."""
    generated_win: Float32[Tensor, "rows"] | None = None

    def mixed_with(self, base: "ReferenceScores", alpha: float) -> "ReferenceScores":
        """Returns α-SPIN's reference, with 1 − α for ``base``."""
        return ReferenceScores(
            real=geometric_reference(self.real, base.real, alpha),
            generated=geometric_reference(self.generated, base.generated, alpha),
        )


def plan(lengths: PairLengths, shape: PackShape, *, epochs: int, seed: int, ranks: int = 1) -> list[list[Step]]:
    return [
        plan_epoch(
            lengths,
            pack_length=shape.pack_length,
            global_batch_pairs=shape.global_batch_pairs,
            seed=seed,
            epoch=epoch,
            ranks=ranks,
        )
        for epoch in range(epochs)
    ]


def pair_lengths(parts: Iterable[pa.Table]) -> PairLengths:
    """Counts the tokens of PAIR_SCHEMA rows; those of one prompt_id share a tree."""
    names = ("prompt", "real", "generated")
    lengths = pa.concat_tables(
        pa.table({name: pc.list_value_length(part[f"{name}_ids"]) for name in names} | {"tree": part["prompt_id"]})
        for part in parts
    )
    keys = lengths["tree"].combine_chunks().dictionary_encode().indices
    return PairLengths(**{name: np.asarray(lengths[name]) for name in names}, tree_key=np.asarray(keys))


def rows_of_rank(epochs: list[list[Step]], rank: int, world_size: int) -> set[int]:
    packs = (pack for steps in epochs for step in steps for pack in step.for_rank(rank, world_size))
    return {row for pack in packs for tree in pack for row in tree}


def score_rows(
    backend: TrainBackend, steps: list[Step], table: pa.Table, shape: PackShape
) -> tuple[list[int], list[float], list[float]]:
    """Scores this rank's packs; returns (rows, log p of real, log p of generated).

    Training uses the same packs and kernels, so the first step's margins are exactly 0.
    """
    rows: list[int] = []
    real_logps: list[float] = []
    generated_logps: list[float] = []
    for step in steps:
        for pack in step.for_rank(dist.get_rank(), dist.get_world_size()):
            batch = shape.build(pack, table).to(backend.device)
            real, generated = pair_logps(backend.score(batch), batch)
            rows += batch.pair_row.tolist()
            real_logps += real.tolist()
            generated_logps += generated.tolist()
    return rows, real_logps, generated_logps


def train_step(
    backend: TrainBackend,
    step: Step,
    table: pa.Table,
    shape: PackShape,
    objective: Objective,
    reference: ReferenceScores | None,
) -> dict[str, float]:
    """Takes one optimizer step; returns its metrics, equal on all ranks.

    Losses are divided by the whole step's counts, as gradients are summed over ranks.

    Raises:
        FloatingPointError: a loss or gradient is not finite; raised on every rank, weights untouched.
    """
    packs = step.for_rank(dist.get_rank(), dist.get_world_size())
    sums = StepSums(backend.device)
    for number, pack in enumerate(packs):
        loss, pack_sums = _pack_loss(backend, pack, step, table, shape, objective, reference)
        backend.backward(loss, last_microbatch=number == len(packs) - 1)
        sums.add(pack_sums)
    try:
        totals = sums.reduce()
        stats = backend.step()
    except FloatingPointError as error:
        ids = table["pair_id"].take([row for pack in step.packs for tree in pack for row in tree]).to_pylist()
        raise FloatingPointError(f"{error}; the pairs of this step: {', '.join(ids)}") from error
    return step_metrics(totals, step, resolve_loss(objective.loss), stats)


def _pack_loss(
    backend: TrainBackend,
    pack: Pack,
    step: Step,
    table: pa.Table,
    shape: PackShape,
    objective: Objective,
    reference: ReferenceScores | None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor | int]]:
    """Returns the pack's share of the step's loss and of its sums."""
    loss = resolve_loss(objective.loss)
    batch = shape.build(pack, table).to(backend.device)
    logps = pair_logps(backend.logps(batch), batch)
    scores, wins = _of_pack(objective, loss, batch, reference)
    policy, against = logps, scores
    if objective.length_normalised and loss.per == "pair":
        policy, against = _per_token(logps, batch), _per_token(scores, batch) if scores else None
    total = loss(policy, against, wins, objective.beta)
    share = total / (step.num_pairs if loss.per == "pair" else step.num_real_tokens)
    if objective.sft_weight and loss.per == "pair":
        share = share + objective.sft_weight * sft_loss(logps.real) / step.num_real_tokens
    with torch.no_grad():
        sums = {"loss": total.detach(), "real_logp": logps.real.sum(), "tokens": batch.num_useful_tokens}
        if loss.per == "pair":
            sums["generated_logp"] = logps.generated.sum()
        if scores is not None:
            sums["real_logp_drift"] = (logps.real - scores.real).sum()
        if (margin := loss.margin(policy, against, objective.beta)) is not None:
            sums |= {"margin": margin.sum(), "correct": (margin > 0).sum()}
    return share, sums


def _of_pack(
    objective: Objective, loss: Loss, batch: PackedBatch, reference: ReferenceScores | None
) -> tuple[PairValues | None, PairValues | None]:
    """Returns the pack's reference scores and win probabilities, None where not needed.

    Raises:
        ValueError: the loss needs what is missing.
    """
    scores = wins = None
    if loss.needs_reference:
        if reference is None:
            raise ValueError(f"the loss {objective.loss} needs reference scores")
        scores = PairValues(reference.real[batch.pair_row], reference.generated[batch.pair_row])
    if loss.needs_wins:
        if reference is None or reference.real_win is None or reference.generated_win is None:
            raise ValueError(f"the loss {objective.loss} needs win probabilities")
        wins = PairValues(reference.real_win[batch.pair_row], reference.generated_win[batch.pair_row])
    return scores, wins


def _per_token(logps: PairValues, batch: PackedBatch) -> PairValues:
    tokens = pair_logps(segment_lengths(batch).float(), batch)
    return PairValues(logps.real / tokens.real, logps.generated / tokens.generated)
