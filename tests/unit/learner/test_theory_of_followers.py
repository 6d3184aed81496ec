"""What the papers after SPIN say of their objectives, on tabular policies with exact expectations."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spin_ray.learner.losses import LOSSES, Loss, MarginLoss, PairValues, SpaceLoss, logistic
from tests.support.tabular import K, distribution, jsd, minimise, size

torch.set_num_threads(1)
REAL, GENERATED = (index.flatten() for index in torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij"))
ZERO = torch.zeros(1, dtype=torch.float64)


def expected(
    loss: Loss,
    logits: Tensor,
    better: Tensor,
    worse: Tensor,
    reference: Tensor,
    beta: float = 1.0,
    counted: Tensor | float = 1.0,
) -> Tensor:
    """E of a loss over y ~ ``better``, y' ~ ``worse``, all log-probabilities; ``counted`` weighs the pairs."""
    policy = logits.log_softmax(0)
    losses = torch.stack(
        [
            loss(PairValues(policy[[i]], policy[[j]]), PairValues(reference[[i]], reference[[j]]), None, beta)
            for i, j in zip(REAL.tolist(), GENERATED.tolist(), strict=True)
        ]
    )
    return ((better[REAL] + worse[GENERATED]).exp() * counted * losses).sum()


def gradient(loss: Loss, real_ratio: float, generated_ratio: float) -> list[float]:
    """d loss / d (r, r') of one pair."""
    ratios = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (real_ratio, generated_ratio)]
    value = loss(PairValues(*ratios), PairValues(ZERO, ZERO), None, 1.0)
    return [part.item() for part in torch.autograd.grad(value, ratios)]


# SPACE


@pytest.mark.parametrize("mu", [0.3, 1.0, 4.0])
def test_the_optimum_of_space_is_the_data_for_every_mu(mu: float) -> None:
    """Noise contrastive estimation: −log σ_μ(r) − μ log(1 − σ_μ(r')) is least where e^r = p_data/p_t: p = p_data."""
    data, opponent = distribution(0), distribution(1)
    loss = SpaceLoss(mu=mu)
    found = minimise(lambda x: expected(loss, x, data, opponent, opponent), opponent)
    torch.testing.assert_close(found, data, rtol=0, atol=1e-5)


def test_space_without_pairs_of_equal_responses_ends_elsewhere() -> None:
    """They are part of both expectations: ``objective.keep_identical`` is on for ``space``."""
    data, opponent = distribution(0), distribution(1)
    differs = (REAL != GENERATED).to(torch.float64)
    found = minimise(lambda x: expected(SpaceLoss(), x, data, opponent, opponent, counted=differs), opponent)
    assert (found - data).abs().max() > 0.01


def test_the_minimum_of_space_is_what_a_classifier_of_single_responses_cannot_tell() -> None:
    """μ = 1: 2 ln 2 − 2·JSD(p_data‖p_t). SPIN's pairs bound the JSD within a factor of 2, SPACE gives it."""
    data, opponent = distribution(0), distribution(1)
    least = expected(SpaceLoss(), data, data, opponent, opponent).item()
    assert least == pytest.approx(2 * math.log(2) - 2 * jsd(data, opponent), abs=1e-12)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_space_begins_with_spins_gradient_up_to_a_factor(mu: float) -> None:
    """At r = r' = 0: ∓μ/(1 + μ), where SPIN with β 1 has ∓½; the loss is (1 + μ) ln(1 + μ) − μ ln μ."""
    factor = mu / (1 + mu)
    assert gradient(SpaceLoss(mu=mu), 0, 0) == pytest.approx([-factor, factor])
    assert gradient(LOSSES["logistic"], 0, 0) == pytest.approx([-0.5, 0.5])
    at_start = SpaceLoss(mu=mu)(PairValues(ZERO, ZERO), PairValues(ZERO, ZERO), None, 1.0).item()
    assert at_start == pytest.approx((1 + mu) * math.log(1 + mu) - mu * math.log(mu))


def test_space_pulls_up_a_human_response_that_fell_with_the_generated_one() -> None:
    """r = −2, r' = −4: SPIN is content with the difference of 2, σ(−2) = 0.12; SPACE's pull is σ(2) = 0.88."""
    assert -gradient(LOSSES["logistic"], -2, -4)[0] == pytest.approx(0.1192, abs=1e-4)
    assert -gradient(SpaceLoss(), -2, -4)[0] == pytest.approx(0.8808, abs=1e-4)


def test_space_survives_ratios_of_hundreds_of_nats() -> None:
    assert gradient(SpaceLoss(mu=2.0), -500, 500) == pytest.approx([-1.0, 2.0])
    assert gradient(SpaceLoss(mu=2.0), 500, -500) == pytest.approx([0.0, 0.0])


# DPO-Positive


def test_dpo_positive_is_spin_where_the_human_response_did_not_fall() -> None:
    anchored = MarginLoss(logistic, positive_weight=50.0)
    for ratios in [(0.0, 0.0), (0.7, 0.2), (0.1, 3.0)]:
        assert gradient(anchored, *ratios) == gradient(LOSSES["logistic"], *ratios)


def test_dpo_positive_takes_the_fall_from_the_margin() -> None:
    """r = −0.5, r' = −2, λ = 5: log(1 + e^−(1.5 − 5·0.5)) = log(1 + e), with slopes −σ(1)·(1 + 5) and σ(1)."""
    anchored = MarginLoss(logistic, positive_weight=5.0)
    policy = PairValues(ZERO - 0.5, ZERO - 2)
    assert anchored(policy, PairValues(ZERO, ZERO), None, 1.0).item() == pytest.approx(math.log1p(math.e))
    slope = 1 / (1 + math.exp(-1))
    assert gradient(anchored, -0.5, -2) == pytest.approx([-6 * slope, slope])
    assert anchored.margin(policy, PairValues(ZERO, ZERO), 1.0).item() == 1.5


# T-SPIN


def tspin(logits: Tensor, data: Tensor, opponent: Tensor, initial: Tensor, beta: float, history: float) -> Tensor:
    loss = LOSSES["reference_free"]
    current = expected(loss, logits, data, opponent, opponent, beta)
    return current + history * expected(loss, logits, opponent, initial, opponent, beta) if history else current


def test_t_spin_without_history_settles_at_a_flatter_distribution_than_the_data() -> None:
    """Without a reference log p_{t+1} = (log p_data − log p_t)/β + const. (SPIN's theorem 5.4 with a flat reference):
    its fixed point is p ∝ p_data^{1/(1 + β)}, the price of the entropy; the error is multiplied by −1/β. β = 2.
    """
    data, policy = distribution(0, spread=0.3), distribution(1, spread=0.3)
    settles = (data / 3).log_softmax(0)
    errors = [size(policy - settles)]
    for _ in range(3):
        policy = minimise(lambda x, now=policy: tspin(x, data, now, now, 2.0, 0.0), policy)
        errors.append(size(policy - settles))
    assert [after / before for before, after in pairwise(errors)] == pytest.approx([0.5] * 3, rel=1e-3)


@pytest.mark.parametrize("history", [0.0, 0.1])
def test_t_spin_goes_on_where_spin_stops_and_flattens(history: float) -> None:
    """p_t = p_data: SPIN's gradient is 0. Without a reference T-SPIN still moves, with its second term or without it,
    and a step lowers the likelier half of log p: the data are no fixed point.
    """
    data, initial = distribution(0), distribution(1)
    logits = data.clone().requires_grad_()
    (of_spin,) = torch.autograd.grad(expected(LOSSES["logistic"], logits, data, data, data), logits)
    assert of_spin.abs().max() < 1e-15
    (of_tspin,) = torch.autograd.grad(tspin(logits, data, data, initial, 1.0, history), logits)
    assert of_tspin @ (data - data.mean()) > 0.1
