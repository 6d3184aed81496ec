"""The work of one train worker, step by step; knows torch.distributed, not Ray.

plan of all epochs -> score the first epoch's packs (reference) -> steps: forward, loss, backward, optimizer
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from jaxtyping import Float32
from torch import Tensor

from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.losses import (
    geometric_reference,
    margins,
    pair_logps,
    segment_lengths,
    sft_loss,
    spin_loss,
    square_loss,
)
from spin_ray.learner.packing import Pack, PairLengths, Step, build_pack, plan_epoch

PairLogps = Float32[Tensor, "pairs"]
LENGTHS_OF_A_PACK = 16
"""How many lengths packs may have: each new shape costs oneDNN new kernels, and padding costs compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a step minimises: mean over pairs of loss(margin), plus ``sft_weight`` times the mean over response tokens
    of -log p(y). Without a ``loss`` only the second term is left: supervised fine-tuning. ``square`` is SPPO's.
    """

    loss: str | None
    beta: float = 1.0
    sft_weight: float = 0.0
    length_normalised: bool = False
    """Margins of log-ratios per response token, not of their sums: a departure from the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackShape:
    pack_length: int
    global_batch_pairs: int
    pad_id: int

    def build(self, pack: Pack, table: pa.Table) -> PackedBatch:
        """The tensors of a pack, which is no longer than it need be: the last one of a step is seldom full."""
        multiple = -(-self.pack_length // LENGTHS_OF_A_PACK)
        return build_pack(pack, table, pack_length=self.pack_length, pad_id=self.pad_id, pad_multiple=multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScores:
    """log p_ref of both responses of every row of the pair table, in nats, in the order of the table."""

    real: Float32[Tensor, "rows"]
    generated: Float32[Tensor, "rows"]
    real_win: Float32[Tensor, "rows"] | None = None
    """Estimate of the probability that the response beats one of the reference; for the square loss only."""
    generated_win: Float32[Tensor, "rows"] | None = None

    def mixed_with(self, base: "ReferenceScores", alpha: float) -> "ReferenceScores":
        """The geometric reference of α-SPIN, α for these scores and 1 − α for ``base``."""
        return ReferenceScores(
            real=geometric_reference(self.real, base.real, alpha),
            generated=geometric_reference(self.generated, base.generated, alpha),
        )


def plan(lengths: PairLengths, shape: PackShape, *, epochs: int, seed: int, ranks: int = 1) -> list[list[Step]]:
    """The steps of every epoch; equal on all ranks."""
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
    """Lengths of the rows of PAIR_SCHEMA tables, one in memory at a time; rows of one prompt_id share a tree."""
    names = ("prompt", "real", "generated")
    lengths = pa.concat_tables(
        pa.table({name: pc.list_value_length(part[f"{name}_ids"]) for name in names} | {"tree": part["prompt_id"]})
        for part in parts
    )
    keys = lengths["tree"].combine_chunks().dictionary_encode().indices
    return PairLengths(**{name: np.asarray(lengths[name]) for name in names}, tree_key=np.asarray(keys))


def rows_of_rank(epochs: list[list[Step]], rank: int, world_size: int) -> set[int]:
    """Rows whose tokens this rank computes with, in any epoch."""
    packs = (pack for steps in epochs for step in steps for pack in step.for_rank(rank, world_size))
    return {row for pack in packs for tree in pack for row in tree}


def score_rows(
    backend: TrainBackend, steps: list[Step], table: pa.Table, shape: PackShape
) -> tuple[list[int], list[float], list[float]]:
    """This rank's share of (rows, log p of real, log p of generated), in the packs that training will use.

    The same packs through the same kernels give the same bits, so the margins of the first step are exactly 0.
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
    """One optimizer step over all ranks; returns its metrics, equal on all ranks.

    Losses are divided by the step's global number of pairs (or response tokens), never by a rank's own: ranks hold
    unequal shares, and gradients are summed over ranks.

    Raises:
        FloatingPointError: a loss or the gradient of any rank is not finite; on every rank, the weights are untouched.
    """
    packs = step.for_rank(dist.get_rank(), dist.get_world_size())
    sums = torch.zeros(7, dtype=torch.float64, device=backend.device)
    for number, pack in enumerate(packs):
        loss, pack_sums = _pack_loss(backend, pack, step, table, shape, objective, reference)
        backend.backward(loss, last_microbatch=number == len(packs) - 1)
        sums += pack_sums
    dist.all_reduce(sums)
    try:
        if not sums.isfinite().all():
            raise FloatingPointError("the loss or a log-probability is not finite; lower the learning rate or beta")
        stats = backend.step()
    except FloatingPointError as error:
        ids = table["pair_id"].take([row for pack in step.packs for tree in pack for row in tree]).to_pylist()
        raise FloatingPointError(f"{error}; the pairs of this step: {', '.join(ids)}") from error
    spin, margin, correct, real_logp, generated_logp, tokens, drift = sums.tolist()
    pairs = step.num_pairs
    metrics = {
        "real_logp": real_logp / pairs,
        "grad_norm": stats.grad_norm,
        "lr": stats.learning_rate,
        "tokens": int(tokens),
    }
    if objective.loss is None:
        return {"loss": -real_logp / step.num_real_tokens, **metrics}
    return {
        "loss": spin / pairs,
        "margin": margin / pairs,
        "accuracy": correct / pairs,
        "generated_logp": generated_logp / pairs,
        "real_logp_drift": drift / pairs,
        **metrics,
    }


def _pack_loss(
    backend: TrainBackend,
    pack: Pack,
    step: Step,
    table: pa.Table,
    shape: PackShape,
    objective: Objective,
    reference: ReferenceScores | None,
) -> tuple[Tensor, Tensor]:
    """Share of the step's loss that this pack has, and the sums that metrics are made of."""
    batch = shape.build(pack, table).to(backend.device)
    real, generated = pair_logps(backend.logps(batch), batch)
    sums = torch.zeros(7, dtype=torch.float64, device=backend.device)
    sums[3] = real.detach().sum()
    sums[5] = batch.num_useful_tokens
    if objective.loss is None:
        return sft_loss(real) / step.num_real_tokens, sums
    if reference is None:
        raise ValueError("the SPIN objective needs reference scores")
    logps = _normalised(real, generated, batch, objective, reference)
    margin = margins(*logps, objective.beta)
    spin = _pairs_loss(logps, margin, batch, objective, reference)
    sums[0], sums[1], sums[2] = spin.detach(), margin.detach().sum(), (margin > 0).sum()
    sums[4] = generated.detach().sum()
    sums[6] = (real.detach() - reference.real[batch.pair_row]).sum()
    loss = spin / step.num_pairs
    if objective.sft_weight:
        loss = loss + objective.sft_weight * sft_loss(real) / step.num_real_tokens
    return loss, sums


def _normalised(
    real: PairLogps, generated: PairLogps, batch: PackedBatch, objective: Objective, reference: ReferenceScores
) -> tuple[PairLogps, PairLogps, PairLogps, PairLogps]:
    """log p of y, y' and their references: sums, or means where the objective says so."""
    logps = (real, generated, reference.real[batch.pair_row], reference.generated[batch.pair_row])
    if not objective.length_normalised:
        return logps
    tokens = pair_logps(segment_lengths(batch).float(), batch)
    return logps[0] / tokens[0], logps[1] / tokens[1], logps[2] / tokens[0], logps[3] / tokens[1]


def _pairs_loss(
    logps: tuple[PairLogps, PairLogps, PairLogps, PairLogps],
    margin: PairLogps,
    batch: PackedBatch,
    objective: Objective,
    reference: ReferenceScores,
) -> Float32[Tensor, ""]:
    """Sum over the pairs of the pack."""
    assert objective.loss is not None
    if objective.loss != "square":
        return spin_loss(margin, objective.loss)
    if reference.real_win is None or reference.generated_win is None:
        raise ValueError("the square loss needs win probabilities")
    real, generated, reference_real, reference_generated = logps
    wins = reference.real_win[batch.pair_row], reference.generated_win[batch.pair_row]
    return square_loss(real - reference_real, generated - reference_generated, *wins, objective.beta)
