"""SDFT: a teacher's most likely tokens, and the policy's divergence, without all [targets, vocab] logits."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spin_ray.learner.head import Head, LogitTransform, padded, rows_per_chunk, upcast

COPIES = 4
"""Tensors [rows, vocab] that a chunk holds at once; a chunk has ``ROWS_PER_CHUNK // COPIES`` rows."""


class TopTokens(NamedTuple):
    """Distributions over k tokens and the rest of the vocabulary, in nats."""

    ids: Int64[Tensor, "targets k"]
    logps: Float[Tensor, "targets k"]
    rest: Float[Tensor, "targets"]
    """log p of all other tokens together; -inf if k is the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class ReadTop:
    """A reader of the k most likely tokens at each target."""

    k: int

    def __call__(
        self, head: Head, hidden: Tensor, at: Tensor, target_ids: Tensor, transform: LogitTransform
    ) -> TopTokens:
        parts = padded(at).split(_rows(hidden))
        found = [_top(_logits(head, hidden, part, transform), self.k) for part in parts]
        return TopTokens(*(torch.cat(values)[: len(at)] for values in zip(*found, strict=True)))


class ReadDivergence:
    """A reader of KL(policy ‖ teacher) at each target; all but the teacher's k tokens count as one outcome.

    The value is a lower bound of the KL over the whole vocabulary, and equal to it for k = vocab.
    """

    def __init__(self, teacher: TopTokens) -> None:
        self.teacher = teacher  # no dataclass: of one FSDP2 would cast the tensors to bf16

    def __call__(
        self, head: Head, hidden: Tensor, at: Tensor, target_ids: Tensor, transform: LogitTransform
    ) -> Float[Tensor, "targets"]:
        """Returns the divergences in fp32 (fp64 for fp64), in nats."""
        rows, values = _rows(hidden), (at, *self.teacher)
        found = [
            checkpoint(_of_chunk, head, hidden, *chunk, transform, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*(padded(each).split(rows) for each in values), strict=True)
        ]
        return torch.cat(found)[: len(at)].clone()  # of a view FSDP2 would warn


def divergence(logits: Float[Tensor, "rows vocab"], teacher: TopTokens) -> Float[Tensor, "rows"]:
    """Returns Σ p log(p/q) over the teacher q's k tokens and the rest as one outcome; terms with p = 0 are 0."""
    total = logits.logsumexp(dim=-1)
    top = logits.gather(-1, teacher.ids) - total[:, None]
    found = _terms(top, teacher.logps).sum(dim=-1)
    if teacher.ids.shape[1] < logits.shape[1]:
        # Not -inf: without a possible token among the others, the gradient would be nan.
        rest = logits.scatter(-1, teacher.ids, torch.finfo(logits.dtype).min / 2).logsumexp(dim=-1) - total
        found = found + _terms(rest, teacher.rest)
    return found


def _terms(policy: Tensor, teacher: Tensor) -> Tensor:
    impossible = policy.exp() == 0
    policy, teacher = policy.masked_fill(impossible, 0), teacher.masked_fill(impossible, 0)
    return policy.exp() * (policy - teacher)


def _of_chunk(
    head: Head, hidden: Tensor, at: Tensor, ids: Tensor, logps: Tensor, rest: Tensor, transform: LogitTransform
) -> Tensor:
    return divergence(_logits(head, hidden, at, transform), TopTokens(ids, logps, rest))


def _top(logits: Tensor, k: int) -> TopTokens:
    total = logits.logsumexp(dim=-1)
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return TopTokens(ids, top - total[:, None], rest - total)


def _logits(head: Head, hidden: Tensor, at: Tensor, transform: LogitTransform) -> Tensor:
    return transform(upcast(head(hidden[at])))


def _rows(hidden: Tensor) -> int:
    return rows_per_chunk(hidden) // COPIES
