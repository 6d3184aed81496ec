"""The work of one train worker, in torch.distributed without Ray."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32
from torch import Tensor

from spin_ray.errors import ConfigError
from spin_ray.learner.backends.base import StepStats, TrainBackend
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.distillation import ReadDivergence
from spin_ray.learner.losses import (
    Loss,
    MarginLoss,
    PairValues,
    SpaceLoss,
    geometric_reference,
    pair_logps,
    resolve_loss,
    segment_lengths,
    sft_loss,
)
from spin_ray.learner.metrics import StepSums, guarded, step_metrics
from spin_ray.learner.packing import Pack, PairLengths, Step, build_pack, plan_epoch, response_names
from spin_ray.learner.sizes import LENGTHS_OF_A_PACK
from spin_ray.learner.teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The loss that a step minimises. Fields without a docstring are those of ``ObjectiveConfig``."""

    loss: str | None
    """None is SFT."""
    beta: float = 1.0
    sft_weight: float = 0.0
    length_normalised: bool = False
    mu: float = 1.0
    positive_weight: float = 0.0
    history_weight: float = 0.0
    top_k: int = 0
    """Tokens per teacher distribution (SDFT); 0: no teacher."""

    def resolve(self) -> Loss:
        """Returns the loss with these parameters."""
        loss = resolve_loss(self.loss)
        if isinstance(loss, MarginLoss) and self.positive_weight:
            return replace(loss, positive_weight=self.positive_weight)
        return replace(loss, mu=self.mu) if isinstance(loss, SpaceLoss) else loss

    def is_of_log_ratios(self) -> bool:
        """Returns True if the log-ratios of a pair alone give its loss, as the evaluation computes it."""
        loss = self.resolve()
        return loss.needs_reference and not loss.needs_wins and not self.length_normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class PackShape:
    pack_length: int
    global_batch_pairs: int
    pad_id: int
    tensor: int = 1
    """Number of neighbouring ranks that compute each pack together."""

    def place(self) -> tuple[int, int]:
        """Returns (rank, ranks), with each tensor group as one rank."""
        return dist.get_rank() // self.tensor, dist.get_world_size() // self.tensor

    def writes(self) -> bool:
        """Returns True on the rank of each tensor group that writes files."""
        return dist.get_rank() % self.tensor == 0

    def build(self, pack: Pack, table: pa.Table) -> PackedBatch:
        """Builds a pack, padded to one of ``LENGTHS_OF_A_PACK`` lengths."""
        multiple = -(-self.pack_length // LENGTHS_OF_A_PACK)
        return build_pack(pack, table, pack_length=self.pack_length, pad_id=self.pad_id, pad_multiple=multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScores:
    """log p_ref of both responses, in nats, in table order."""

    real: Float32[Tensor, "rows"]
    generated: Float32[Tensor, "rows"]
    real_win: Float32[Tensor, "rows"] | None = None
    """Estimate of P(y beats a response of the reference)."""
    generated_win: Float32[Tensor, "rows"] | None = None
    opponent_real: Float32[Tensor, "rows"] | None = None
    """log p_θt(y) if the reference is not θ_t itself."""

    def mixed_with(self, base: "ReferenceScores", alpha: float) -> "ReferenceScores":
        """Returns α-SPIN's reference; ``base`` has weight 1 − α."""
        return ReferenceScores(
            real=geometric_reference(self.real, base.real, alpha),
            generated=geometric_reference(self.generated, base.generated, alpha),
            opponent_real=self.real,
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
    """Counts the tokens of PAIR_SCHEMA or TRIPLET_SCHEMA rows. Rows of one ``prompt_id``, prompt and y share a tree."""
    names = ("prompt", "real", "generated")
    trees: dict[str, int] = {}

    def counted(part: pa.Table) -> pa.Table:
        columns = {name: pc.list_value_length(part[f"{name}_ids"]) for name in names}
        if "initial_ids" in part.column_names:
            columns["generated"] = pc.add(columns["generated"], pc.list_value_length(part["initial_ids"]))
        stems = response_names(part["prompt_id"].to_pylist(), part["prompt_ids"], part["real_ids"])
        keys = pa.array([trees.setdefault(stem, len(trees)) for stem in stems], pa.int64())
        return pa.table(columns | {"tree": keys})

    lengths = pa.concat_tables(counted(part) for part in parts)
    return PairLengths(**{name: np.asarray(lengths[name]) for name in names}, tree_key=np.asarray(lengths["tree"]))


def rows_of_rank(epochs: list[list[Step]], rank: int, world_size: int) -> set[int]:
    packs = (pack for steps in epochs for step in steps for pack in step.for_rank(rank, world_size))
    return {row for pack in packs for tree in pack for row in tree}


def own_packs(rows: pa.Table, shape: PackShape, seed: int = 0) -> list[Pack]:
    """Plans one epoch of all rows; returns this rank's packs."""
    rank, ranks = shape.place()
    (steps,) = plan(pair_lengths([rows]), shape, epochs=1, seed=seed, ranks=ranks)
    return [pack for step in steps for pack in step.for_rank(rank, ranks)]


def score_rows(
    backend: TrainBackend, steps: list[Step], table: pa.Table, shape: PackShape
) -> tuple[list[int], list[float], list[float]]:
    """Scores this rank's packs; returns (rows, log p of real, log p of generated).

    Training uses the same packs and kernels, so the first step's margins are exactly 0.
    """
    packs = [pack for step in steps for pack in step.for_rank(*shape.place())]
    if not packs:
        return [], [], []
    batches = (batch for _, batch in feed(packs, table, shape, backend.device))
    scored = [(batch.pair_row, *pair_logps(backend.score(batch), batch)) for batch in batches]
    rows, real, generated = (torch.cat(values).tolist() for values in zip(*scored, strict=True))
    return rows, real, generated


def train_step(
    backend: TrainBackend,
    step: Step,
    table: pa.Table,
    shape: PackShape,
    objective: Objective,
    reference: ReferenceScores | None,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """Takes one optimizer step; returns its metrics, equal on all ranks.

    Losses are divided by the whole step's counts, because gradients are summed over ranks.

    Raises:
        ConfigError: the backend's ``step`` returns no ``StepStats``.
        FloatingPointError: a loss or gradient is not finite; raised on every rank, weights untouched.
    """
    packs = step.for_rank(*shape.place())
    sums = StepSums(backend.device)
    for number, (tokens, batch) in enumerate(feed(packs, table, shape, backend.device)):
        if teacher is not None:
            loss, pack_sums = _distilled(backend, batch, step, teacher)
        else:
            loss, pack_sums = _pack_loss(backend, batch, step, objective, reference)
        backend.backward(guarded(loss, pack_sums), last_microbatch=number == len(packs) - 1)
        sums.add(pack_sums | {"tokens": tokens})
    sums.send(shape.tensor)
    try:
        stats = _take_step(backend, sums)
        totals = sums.read()
    except FloatingPointError as error:
        ids = table["pair_id"].take([row for pack in step.packs for tree in pack for row in tree]).to_pylist()
        raise FloatingPointError(f"{error}; the pairs of this step: {', '.join(ids)}") from error
    return step_metrics(totals, step, objective.resolve(), stats)


def _take_step(backend: TrainBackend, sums: StepSums) -> StepStats:
    """Takes the step of any backend.

    Raises:
        ConfigError: it returns nothing of use.
        FloatingPointError: of the sums, if one of them is not finite, which says more than a gradient's norm.
    """
    try:
        stats = backend.step()
    except FloatingPointError:
        sums.read()
        raise
    if not (hasattr(stats, "grad_norm") and hasattr(stats, "learning_rate")):
        raise ConfigError(
            f"train.backend: {type(backend).__name__}.step() returns a {type(stats).__name__}; expected a "
            "spin_ray.learner.backends.base.StepStats"
        )
    return stats


def feed(
    packs: Sequence[Pack], table: pa.Table, shape: PackShape, device: torch.device
) -> Iterator[tuple[int, PackedBatch]]:
    """Yields each pack's number of useful tokens and its tensors.

    A thread builds the next pack meanwhile. Copies to a GPU are asynchronous.
    """

    def build(pack: Pack) -> tuple[int, PackedBatch]:
        batch = shape.build(pack, table)
        return batch.num_useful_tokens, batch.map(Tensor.pin_memory) if device.type == "cuda" else batch

    def sent(tokens: int, batch: PackedBatch) -> tuple[int, PackedBatch]:
        return tokens, batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    with ThreadPoolExecutor(1, thread_name_prefix="packs") as builder:
        ahead: deque[Future[tuple[int, PackedBatch]]] = deque()
        for pack in packs:
            ahead.append(builder.submit(build, pack))
            if len(ahead) > 1:
                yield sent(*ahead.popleft().result())
        while ahead:
            yield sent(*ahead.popleft().result())


def _pack_loss(
    backend: TrainBackend,
    batch: PackedBatch,
    step: Step,
    objective: Objective,
    reference: ReferenceScores | None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor | int]]:
    loss = objective.resolve()
    of_segments = backend.logps(batch)
    logps = pair_logps(of_segments, batch)
    scores, wins = _of_pack(objective, loss, batch, reference)
    policy, against = logps, scores
    if objective.length_normalised and loss.per == "pair":
        policy, against = _per_token(logps, batch), _per_token(scores, batch) if scores else None
    total = loss(policy, against, wins, objective.beta)
    if objective.history_weight and batch.initial_segment is not None:
        total = total + objective.history_weight * _history(objective, loss, of_segments, batch)
    share = total / (step.num_pairs if loss.per == "pair" else step.num_real_tokens)
    if objective.sft_weight and loss.per == "pair":
        share = share + objective.sft_weight * sft_loss(logps.real) / step.num_real_tokens
    with torch.no_grad():
        sums: dict[str, Tensor | int] = {"loss": total.detach(), "real_logp": logps.real.sum()}
        if loss.per == "pair":
            sums["generated_logp"] = logps.generated.sum()
        if scores is not None and reference is not None:
            before = reference.real if reference.opponent_real is None else reference.opponent_real
            sums["real_logp_drift"] = (logps.real - before[batch.pair_row]).sum()
        if (margin := loss.margin(policy, against, objective.beta)) is not None:
            sums |= {"margin": margin.sum(), "correct": (margin > 0).sum()}
    return share, sums


def _history(
    objective: Objective, loss: Loss, logps: Float[Tensor, "segments"], batch: PackedBatch
) -> Float[Tensor, ""]:
    """Returns the loss of (y′, y_0), T-SPIN's second term (arXiv 2601.08198, equation 7)."""
    assert batch.initial_segment is not None
    values = logps / segment_lengths(batch) if objective.length_normalised else logps
    generated = pair_logps(values, batch).generated
    return loss(PairValues(generated, values[batch.initial_segment]), None, None, objective.beta)


def _distilled(
    backend: TrainBackend, batch: PackedBatch, step: Step, teacher: Teacher
) -> tuple[Float[Tensor, ""], dict[str, Tensor | int]]:
    """Returns the pack's share of the mean KL(policy ‖ teacher) per token of y′, and the sum."""
    total = backend.read(batch, ReadDivergence(teacher.of_pack(batch))).sum()
    return total / step.num_real_tokens, {"loss": total.detach()}


def _of_pack(
    objective: Objective, loss: Loss, batch: PackedBatch, reference: ReferenceScores | None
) -> tuple[PairValues | None, PairValues | None]:
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
