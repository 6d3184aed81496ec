"""Losses, and sequence log-probabilities (fp32, nats).

A loss is a SUM; the caller divides by the whole step's counts, because packs hold unequal numbers of pairs.
"""

import math
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
    """Log-probabilities (nats) or win probabilities of y and y' per pair."""

    real: Float[Tensor, "pairs"]
    generated: Float[Tensor, "pairs"]


MarginFunction = Callable[[Float[Tensor, "pairs"]], Float[Tensor, "pairs"]]


def response_logps(
    target_logps: Float[Tensor, "targets"], segment: Int64[Tensor, "targets"], num_segments: int
) -> Float[Tensor, "segments"]:
    """Returns log p(response | prompt) in fp32.

    A masked sum has a fixed order, unlike ``index_add`` on CUDA, so margins start at exactly 0.
    """
    member = segment == torch.arange(num_segments, device=segment.device)[:, None]
    return torch.where(member, target_logps.float(), 0.0).sum(dim=1)


def pair_logps(logps: Float[Tensor, "segments"], batch: PackedBatch) -> PairValues:
    """Returns log p(y|x) and log p(y'|x), which is nan without y' (SFT)."""
    generated = logps[batch.generated_segment.clamp(min=0)] if batch.num_segments else logps.new_empty(0)
    return PairValues(logps[batch.real_segment], torch.where(batch.generated_segment >= 0, generated, torch.nan))


def segment_lengths(batch: PackedBatch) -> Int64[Tensor, "segments"]:
    """Counts tokens; ``bincount`` would wait for the GPU."""
    member = batch.segment == torch.arange(batch.num_segments, device=batch.segment.device)[:, None]
    return member.sum(dim=1)


def geometric_reference(
    last: Float[Tensor, "pairs"], base: Float[Tensor, "pairs"], alpha: float
) -> Float[Tensor, "pairs"]:
    """Returns log(p_t^α p_0^(1−α)), the reference of α-SPIN (arXiv 2404.04291).

    The normaliser log Z(x) cancels in the margin.
    """
    return alpha * last + (1 - alpha) * base


def margins(
    real_logp: Float[Tensor, "pairs"],
    generated_logp: Float[Tensor, "pairs"],
    reference_real: Float[Tensor, "pairs"],
    reference_generated: Float[Tensor, "pairs"],
    beta: float,
) -> Float[Tensor, "pairs"]:
    """Returns m, the argument of ℓ in equation 4.7, where beta is λ.

    m = β [ log p_θ(y|x)/p_ref(y|x) − log p_θ(y'|x)/p_ref(y'|x) ], in nats times beta
    """
    return beta * ((real_logp - reference_real) - (generated_logp - reference_generated))


def logistic(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """Returns ℓ(m) = log(1 + e^−m)."""
    return functional.softplus(-margin)


def hinge(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    return functional.relu(1 - margin)


def exponential(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    return torch.exp(-margin)


def correlation(margin: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
    """Returns ℓ(m) = 1 − m, unbounded below: only early stopping ends it."""
    return 1 - margin


MARGIN_FUNCTIONS: dict[str, MarginFunction] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
"""ℓ of equation 4.7: convex and non-increasing with ℓ'(0) < 0 (Assumption 5.1)."""


def spin_loss(margin: Float[Tensor, "pairs"], function: MarginFunction = logistic) -> Float[Tensor, ""]:
    """Returns Σ ℓ(m), the sum in equation 4.7."""
    return function(margin).sum()


def square_loss(
    real_ratio: Float[Tensor, "pairs"],
    generated_ratio: Float[Tensor, "pairs"],
    real_win: Float[Tensor, "pairs"],
    generated_win: Float[Tensor, "pairs"],
    beta: float,
) -> Float[Tensor, ""]:
    """Returns SPPO's loss (arXiv 2405.00675, equation 4.4).

    ½ Σ [ (r_w − (P_w − ½)/β)² + (r_l − (P_l − ½)/β)² ]

    Args:
        real_ratio: log p_θ/p_ref of the better response, in nats.
        real_win: estimate of P(better response beats a response of p_t).
    """
    of_real = real_ratio - (real_win - 0.5) / beta
    of_generated = generated_ratio - (generated_win - 0.5) / beta
    return (of_real.square() + of_generated.square()).sum() / 2


def space_loss(
    real_ratio: Float[Tensor, "pairs"], generated_ratio: Float[Tensor, "pairs"], mu: float
) -> Float[Tensor, ""]:
    """Returns SPACE's loss (arXiv 2512.07175): noise contrastive estimation with noise p_ref.

    Σ [ −log σ_μ(r) − μ log(1 − σ_μ(r′)) ], σ_μ(x) = 1/(1 + μ e^−x)

    Args:
        real_ratio: r = log p_θ(y|x)/p_ref(y|x), in nats.
        generated_ratio: r′, the same of y′.
    """
    log_mu = math.log(mu)
    return (functional.softplus(log_mu - real_ratio) + mu * functional.softplus(generated_ratio - log_mu)).sum()


def sft_loss(real_logp: Float[Tensor, "pairs"]) -> Float[Tensor, ""]:
    """Returns −Σ log p(y|x) over pairs; a shared y counts once per pair."""
    return -real_logp.sum()


@runtime_checkable
class Loss(Protocol):
    """The protocol behind ``objective.loss``."""

    @property
    def needs_reference(self) -> bool:
        """Returns False if ``reference`` may be None."""
        ...

    @property
    def needs_wins(self) -> bool:
        """Returns False if ``wins`` may be None."""
        ...

    @property
    def per(self) -> Literal["pair", "token"]:
        """Returns what the caller divides by: pairs, or human response tokens."""
        ...

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        """Returns the SUM over a pack's pairs, differentiable in ``policy`` (log p_θ, nats)."""
        ...

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> Float[Tensor, "pairs"] | None:
        """Returns the margin to log and to limit, or None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _AgainstReference:
    """A loss of pairs whose margin, logged and limited, is that of equation 4.7."""

    needs_reference: bool = True
    needs_wins: bool = False
    per: Literal["pair", "token"] = "pair"

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> Float[Tensor, "pairs"]:
        assert reference is not None
        return margins(*policy, *reference, beta)


@dataclass(frozen=True, slots=True)
class MarginLoss(_AgainstReference):
    """ℓ(margin) of equation 4.7; with a ``positive_weight``, DPO-Positive (arXiv 2402.13228)."""

    function: MarginFunction
    positive_weight: float = 0.0
    """λ in ℓ(margin − β λ max(0, −r)), r = log p_θ(y|x)/p_ref(y|x). The logged margin omits this term."""

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        margin = self.margin(policy, reference, beta)
        if self.positive_weight:
            assert reference is not None
            margin = margin - beta * self.positive_weight * functional.relu(reference.real - policy.real)
        return spin_loss(margin, self.function)


@dataclass(frozen=True, slots=True)
class SpaceLoss(_AgainstReference):
    """``space_loss``; beta scales only the margin, which is logged and limited."""

    mu: float = 1.0

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        assert reference is not None
        return space_loss(policy.real - reference.real, policy.generated - reference.generated, self.mu)


@dataclass(frozen=True, slots=True)
class ReferenceFreeLoss:
    """ℓ(β [log p_θ(y|x) − log p_θ(y′|x)]), the first term of T-SPIN (arXiv 2601.08198, equation 7, β for its α)."""

    function: MarginFunction
    needs_reference: bool = False
    needs_wins: bool = False
    per: Literal["pair", "token"] = "pair"

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        return spin_loss(beta * (policy.real - policy.generated), self.function)

    def margin(self, policy: PairValues, reference: PairValues | None, beta: float) -> None:
        """Returns None: without a reference, margins do not start at 0, which the health limit assumes."""
        return None


@dataclass(frozen=True, slots=True)
class SquareLoss(_AgainstReference):
    """``square_loss``; the margin is only logged and limited."""

    needs_wins: bool = True

    def __call__(
        self, policy: PairValues, reference: PairValues | None, wins: PairValues | None, beta: float
    ) -> Float[Tensor, ""]:
        assert reference is not None and wins is not None
        return square_loss(policy.real - reference.real, policy.generated - reference.generated, *wins, beta)


@dataclass(frozen=True, slots=True)
class SftLoss:
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
    "space": SpaceLoss(),
    "square": SquareLoss(),
    "reference_free": ReferenceFreeLoss(logistic),
    None: SftLoss(),
}


_OF_AN_OBJECT = ("needs_reference", "needs_wins", "per", "margin")
"""Attributes of a ``Loss`` that a function of the margin lacks."""


def resolve_loss(name: str | None) -> Loss:
    """Returns the loss for a name, or for the import path of a ``Loss`` or a function ℓ(margin).

    Raises:
        ConfigError: there is no such loss.
    """
    if name in LOSSES:
        return LOSSES[name]
    found = import_object(str(name), "objective.loss", [*MARGIN_FUNCTIONS, "space"])
    if isinstance(found, type):
        raise ConfigError(f"objective.loss: {name} is a class; name an object of it, or a function of the margin")
    lacking = [attribute for attribute in _OF_AN_OBJECT if not _has(found, attribute)]
    if len(lacking) == len(_OF_AN_OBJECT):
        if not callable(found):
            raise ConfigError(f"objective.loss: {name} is neither a Loss nor a function of the margin")
        return MarginLoss(found)
    if not callable(found):
        lacking.append("__call__")
    if lacking:
        raise ConfigError(f"objective.loss: {name} lacks {', '.join(lacking)}, which a Loss has (docs/extending.md)")
    return found


def _has(found: object, attribute: str) -> bool:
    """Returns False for a ``margin`` that is a number, as a function of the margin may have one."""
    return hasattr(found, attribute) and (attribute != "margin" or callable(getattr(found, attribute)))
