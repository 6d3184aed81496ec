"""Sequence log-probabilities and the losses of the family; pure functions of tensors, and the table of losses by name.

Every loss is a SUM over the pairs at hand. The caller divides by the number of pairs (or tokens) in the whole optimizer
step, over all packs and ranks: a mean per pack would weigh pairs by how full their pack happens to be.
Dimensions are those of ``spin_ray.learner.batch``. All log-probabilities are fp32 sums over response tokens, in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from spin_ray.errors import ConfigError
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.import_path import import_object


class PairValues(NamedTuple):
    """One number for y and one for y' of every pair: log-probabilities in nats, or win probabilities in 0 … 1."""

    real: Float[Tensor, "pairs"]
    generated: Float[Tensor, "pairs"]


MarginFunction = Callable[[Float[Tensor, "pairs"]], Float[Tensor, "pairs"]]


def response_logps(
    target_logps: Float[Tensor, "targets"], segment: Int64[Tensor, "targets"], num_segments: int
) -> Float[Tensor, "segments"]:
    """Returns log p(response | prompt) = Σ over the response's tokens, in fp32.

    A masked sum and not ``index_add``, which adds in no fixed order on CUDA: the same pack must give the same bits when
    it is scored as reference and when it is trained on, so that margins start at exactly 0.
    """
    member = segment == torch.arange(num_segments, device=segment.device)[:, None]
    return torch.where(member, target_logps.float(), 0.0).sum(dim=1)


def pair_logps(logps: Float[Tensor, "segments"], batch: PackedBatch) -> PairValues:
    """Returns log p(y|x) and log p(y'|x) of every pair; the latter is nan where a row has no y' (SFT)."""
    generated = logps[batch.generated_segment.clamp(min=0)] if batch.num_segments else logps.new_empty(0)
    return PairValues(logps[batch.real_segment], torch.where(batch.generated_segment >= 0, generated, torch.nan))


def segment_lengths(batch: PackedBatch) -> Int64[Tensor, "segments"]:
    """Counts the response tokens of every segment of the pack."""
    return torch.bincount(batch.segment, minlength=batch.num_segments)


def geometric_reference(
    last: Float[Tensor, "pairs"], base: Float[Tensor, "pairs"], alpha: float
) -> Float[Tensor, "pairs"]:
    """Returns log p_t^α p_0^(1−α), the reference of α-SPIN (arXiv 2404.04291), in nats.

    The mixture is not normalised: log Z(x) is the same for y and y', so it cancels in the margin.
    """
    return alpha * last + (1 - alpha) * base


def margins(
    real_logp: Float[Tensor, "pairs"],
    generated_logp: Float[Tensor, "pairs"],
    reference_real: Float[Tensor, "pairs"],
    reference_generated: Float[Tensor, "pairs"],
    beta: float,
) -> Float[Tensor, "pairs"]:
    """Returns the argument of ℓ in equation 4.7, in nats times beta (λ in the paper).

    m = β [ log p_θ(y|x)/p_ref(y|x) − log p_θ(y'|x)/p_ref(y'|x) ]

    The length-normalised variant is the same function of log-probabilities per token.
    """
    return beta * ((real_logp - reference_real) - (generated_logp - reference_generated))


def logistic(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """Returns ℓ(m) = log(1 + e^−m); ℓ(0) = ln 2, ℓ'(0) = −1/2."""
    return functional.softplus(-margin)


def hinge(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """Returns ℓ(m) = max(0, 1 − m); ℓ(0) = 1, ℓ'(0) = −1."""
    return functional.relu(1 - margin)


def exponential(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """Returns ℓ(m) = e^−m; ℓ(0) = 1, ℓ'(0) = −1."""
    return torch.exp(-margin)


def correlation(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """Returns ℓ(m) = 1 − m; ℓ(0) = 1, ℓ'(0) = −1.

    The loss is unbounded below, and only early stopping ends it (the paper's IPM-like case).
    """
    return 1 - margin


MARGIN_FUNCTIONS: dict[str, MarginFunction] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
"""ℓ of equation 4.7 by name: convex and non-increasing with ℓ'(0) < 0 (Assumption 5.1)."""


def spin_loss(margin: Float[Tensor, "pairs"], function: MarginFunction = logistic) -> Float[Tensor, ""]:
    """Returns Σ over pairs of ℓ(m), equation 4.7 before its division by the number of pairs in the step."""
    return function(margin).sum()


def square_loss(
    real_ratio: Float[Tensor, "pairs"],
    generated_ratio: Float[Tensor, "pairs"],
    real_win: Float[Tensor, "pairs"],
    generated_win: Float[Tensor, "pairs"],
    beta: float,
) -> Float[Tensor, ""]:
    """Returns SPPO's loss (arXiv 2405.00675, equation 4.4 with a batch's best and worst response).

    ½ Σ over pairs of [ (r_w − (P_w − ½)/β)² + (r_l − (P_l − ½)/β)² ]

    Each log-ratio is drawn to where the multiplicative weights update p_{t+1} ∝ p_t e^{P/β} takes it.

    Args:
        real_ratio: log p_θ/p_ref of the better response, in nats; ``generated_ratio``: of the worse one.
        real_win: estimate of P(better response beats one of p_t), in 0 … 1; ``generated_win``: of the worse one.
    """
    of_real = real_ratio - (real_win - 0.5) / beta
    of_generated = generated_ratio - (generated_win - 0.5) / beta
    return (of_real.square() + of_generated.square()).sum() / 2


def sft_loss(real_logp: Float[Tensor, "pairs"]) -> Float[Tensor, ""]:
    """Returns −Σ over pairs of log p(y|x), before its division by the number of real response tokens in the step.

    A y that several pairs share counts once for each, however its rows were packed (as in ``Step.num_real_tokens``).
    """
    return -real_logp.sum()


@runtime_checkable
class Loss(Protocol):
    """The loss of an objective: what has to be at hand, and how it is computed. Attributes serve as properties."""

    @property
    def needs_reference(self) -> bool:
        """True: log p_ref of the pairs is scored before the first step. False: ``reference`` is None."""
        ...

    @property
    def needs_wins(self) -> bool:
        """True: the pairs have win probabilities (``iter_NNN/wins``) and a reference. False: ``wins`` is None."""
        ...

    @property
    def per(self) -> Literal["pair", "token"]:
        """The divisor of the sum: the pairs of the step, or its human response tokens (rows need no y' then)."""
        ...

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        """Returns the SUM over the pairs of a pack, differentiable in ``policy``, log p_θ of y and y' in nats."""
        ...

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> Float[Tensor, "pairs"] | None:
        """Returns the margin that is logged and that health limits watch; None if the loss has none."""
        ...


@dataclass(frozen=True, slots=True)
class MarginLoss:
    """ℓ(margin), equation 4.7. Example: ``MarginLoss(logistic)``."""

    function: MarginFunction
    """ℓ, applied to each margin."""
    needs_reference: bool = True
    needs_wins: bool = False
    per: Literal["pair", "token"] = "pair"

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        return spin_loss(self.margin(policy, reference, beta), self.function)

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> Float[Tensor, "pairs"]:
        assert reference is not None
        return margins(*policy, *reference, beta)


@dataclass(frozen=True, slots=True)
class SquareLoss:
    """SPPO's square loss of both log-ratios (``square_loss``); its margin is only watched."""

    needs_reference: bool = True
    needs_wins: bool = True
    per: Literal["pair", "token"] = "pair"

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        assert reference is not None and wins is not None
        return square_loss(policy.real - reference.real, policy.generated - reference.generated, *wins, beta)

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> Float[Tensor, "pairs"]:
        assert reference is not None
        return margins(*policy, *reference, beta)


@dataclass(frozen=True, slots=True)
class SftLoss:
    """−log p(y), supervised fine-tuning (``sft_loss``)."""

    needs_reference: bool = False
    needs_wins: bool = False
    per: Literal["pair", "token"] = "token"

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        return sft_loss(policy.real)

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> None:
        return None


LOSSES: dict[str | None, Loss] = {
    **{name: MarginLoss(function) for name, function in MARGIN_FUNCTIONS.items()},
    "square": SquareLoss(),
    None: SftLoss(),
}
"""The losses by name; None is SFT's, as manifests have it."""


def resolve_loss(name: str | None) -> Loss:
    """Returns the loss of ``name``, which may also be an import path: ``my_pkg.mine:loss``.

    The path names a ``Loss``, or a plain function ℓ of the margins, which becomes a ``MarginLoss``.

    Raises:
        ConfigError: there is no such loss, or the path leads to neither.
    """
    if name in LOSSES:
        return LOSSES[name]
    found = import_object(str(name), "objective.loss", LOSSES)
    if isinstance(found, type):
        raise ConfigError(f"objective.loss: {name} is a class; name an object of it, or a function of the margin")
    if isinstance(found, Loss):
        return found
    if not callable(found):
        raise ConfigError(f"objective.loss: {name} is neither a Loss nor a function of the margin")
    return MarginLoss(found)
