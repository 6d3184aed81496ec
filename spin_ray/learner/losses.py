"""Sequence log-probabilities and the SPIN losses; pure functions of tensors.

Every loss is a SUM over the pairs at hand. The caller divides by the number of pairs (or tokens) in the whole optimizer
step, over all packs and ranks: a mean per pack would weigh pairs by how full their pack happens to be.
Dimensions are those of ``spin_ray.learner.batch``. All log-probabilities are fp32 sums over response tokens, in nats.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from spin_ray.learner.batch import PackedBatch


def response_logps(
    target_logps: Float[Tensor, "targets"], segment: Int64[Tensor, "targets"], num_segments: int
) -> Float[Tensor, "segments"]:
    """log p(response | prompt) = Σ over its tokens, in fp32.

    A masked sum and not ``index_add``, which adds in no fixed order on CUDA: the same pack must give the same bits when
    it is scored as reference and when it is trained on, so that margins start at exactly 0.
    """
    member = segment == torch.arange(num_segments, device=segment.device)[:, None]
    return torch.where(member, target_logps.float(), 0.0).sum(dim=1)


def pair_logps(
    logps: Float[Tensor, "segments"], batch: PackedBatch
) -> tuple[Float[Tensor, "pairs"], Float[Tensor, "pairs"]]:
    """log p(y|x) and log p(y'|x) of every pair; the latter is nan where a row has no y' (SFT): no loss can use it."""
    generated = logps[batch.generated_segment.clamp(min=0)] if batch.num_segments else logps.new_empty(0)
    return logps[batch.real_segment], torch.where(batch.generated_segment >= 0, generated, torch.nan)


def margins(
    real_logp: Float[Tensor, "pairs"],
    generated_logp: Float[Tensor, "pairs"],
    reference_real: Float[Tensor, "pairs"],
    reference_generated: Float[Tensor, "pairs"],
    beta: float,
) -> Float[Tensor, "pairs"]:
    """The argument of ℓ in equation 4.7, in nats times beta (λ in the paper).

    m = β [ log p_θ(y|x)/p_ref(y|x) − log p_θ(y'|x)/p_ref(y'|x) ]

    The length-normalised variant is the same function of log-probabilities per token.
    """
    return beta * ((real_logp - reference_real) - (generated_logp - reference_generated))


def geometric_reference(
    last: Float[Tensor, "pairs"], base: Float[Tensor, "pairs"], alpha: float
) -> Float[Tensor, "pairs"]:
    """log p_t^α p_0^(1−α), the reference of α-SPIN (arXiv 2404.04291), in nats.

    It is not normalised: log Z(x) is the same for y and y', so it cancels in the margin.
    """
    return alpha * last + (1 - alpha) * base


def segment_lengths(batch: PackedBatch) -> Int64[Tensor, "segments"]:
    """Response tokens of every segment of the pack."""
    return torch.bincount(batch.segment, minlength=batch.num_segments)


def logistic(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """ℓ(m) = log(1 + e^−m); ℓ(0) = ln 2, ℓ'(0) = −1/2."""
    return functional.softplus(-margin)


def hinge(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """ℓ(m) = max(0, 1 − m); ℓ(0) = 1, ℓ'(0) = −1."""
    return functional.relu(1 - margin)


def exponential(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """ℓ(m) = e^−m; ℓ(0) = 1, ℓ'(0) = −1."""
    return torch.exp(-margin)


def correlation(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """ℓ(m) = 1 − m; ℓ(0) = 1, ℓ'(0) = −1. Unbounded below: only early stopping ends it (the paper's IPM-like case)."""
    return 1 - margin


LOSSES: dict[str, Callable[[Float[Tensor, "pairs"]], Float[Tensor, "pairs"]]] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
"""ℓ of equation 4.7: convex and non-increasing with ℓ'(0) < 0 (Assumption 5.1)."""


def spin_loss(margin: Float[Tensor, "pairs"], loss: str = "logistic") -> Float[Tensor, ""]:
    """Σ over pairs of ℓ(m), equation 4.7 before its division by the number of pairs in the step."""
    return LOSSES[loss](margin).sum()


def square_loss(
    real_ratio: Float[Tensor, "pairs"],
    generated_ratio: Float[Tensor, "pairs"],
    real_win: Float[Tensor, "pairs"],
    generated_win: Float[Tensor, "pairs"],
    beta: float,
) -> Float[Tensor, ""]:
    """SPPO (arXiv 2405.00675, equation 4.4 with a batch's best and worst response): each log-ratio is drawn to where
    the multiplicative weights update p_{t+1} ∝ p_t e^{P/β} takes it.

    ½ Σ over pairs of [ (r_w − (P_w − ½)/β)² + (r_l − (P_l − ½)/β)² ]

    Args:
        real_ratio: log p_θ/p_ref of the better response, in nats; ``generated_ratio``: of the worse one.
        real_win: estimate of P(better response beats one of p_t), in 0 … 1; ``generated_win``: of the worse one.
    """
    of_real = real_ratio - (real_win - 0.5) / beta
    of_generated = generated_ratio - (generated_win - 0.5) / beta
    return (of_real.square() + of_generated.square()).sum() / 2


def sft_loss(real_logp: Float[Tensor, "pairs"]) -> Float[Tensor, ""]:
    """−Σ over pairs of log p(y|x), before its division by the number of real response tokens in the step.

    A y that several pairs share counts once for each, however its rows were packed (as in ``Step.num_real_tokens``).
    """
    return -real_logp.sum()
