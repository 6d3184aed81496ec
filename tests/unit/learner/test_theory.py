"""The paper's theorems on tabular policies: softmax over K outcomes, exact expectations, the project's own losses.

A pair (i, j) has weight p_data(i)·p_opponent(j); all K² of them are one batch.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spin_ray.learner.losses import MARGIN_FUNCTIONS, geometric_reference, margins, sft_loss, square_loss
from tests.support.tabular import K, distribution, jsd, kl, minimise, size

torch.set_num_threads(1)
LOSS_NAMES = list(MARGIN_FUNCTIONS)


def objective(
    logits: Tensor,
    data: Tensor,
    opponent: Tensor,
    *,
    beta: float,
    reference: Tensor | None = None,
    loss: str = "logistic",
) -> Tensor:
    """E over y ~ data, y' ~ opponent of ℓ(margin), equation 4.7; arguments are log-probabilities."""
    reference = opponent if reference is None else reference
    policy = logits.log_softmax(0)
    real, generated = (index.flatten() for index in torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij"))
    margin = margins(policy[real], policy[generated], reference[real], reference[generated], beta)
    return ((data[real] + opponent[generated]).exp() * MARGIN_FUNCTIONS[loss](margin)).sum()


def spin_iteration(data: Tensor, opponent: Tensor, beta: float) -> Tensor:
    return minimise(lambda logits: objective(logits, data, opponent, beta=beta), opponent)


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_theorem_5_4_minimiser_is_the_opponent_times_the_ratio_to_the_power_1_over_beta(beta: float) -> None:
    """p_{t+1} ∝ p_t (p_data/p_t)^{1/β}."""
    data, opponent = distribution(0), distribution(1)
    expected = (opponent + (data - opponent) / beta).log_softmax(0)
    torch.testing.assert_close(spin_iteration(data, opponent, beta), expected, rtol=0, atol=1e-5)


def test_beta_1_lands_on_the_data_in_one_iteration() -> None:
    data, opponent = distribution(0), distribution(1)
    assert kl(data, opponent) > 0.1
    torch.testing.assert_close(spin_iteration(data, opponent, 1.0), data, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta", "factor"), [(5.0, 0.8), (2.0, 0.5), (0.8, 0.25), (0.4, 1.5)])
def test_log_ratio_error_is_multiplied_by_1_minus_1_over_beta_per_iteration(beta: float, factor: float) -> None:
    """|1 − 1/β|: 0.8, 0.5, 0.25; and 1.5 for β = 0.4 < 1/2: solved to optimality, SPIN diverges there."""
    data, policy = distribution(0, spread=0.3), distribution(1, spread=0.3)
    errors = [size(data - policy)]
    for _ in range(3):
        policy = spin_iteration(data, policy, beta)
        errors.append(size(data - policy))
    ratios = [after / before for before, after in pairwise(errors)]
    assert ratios == pytest.approx([factor] * 3, rel=1e-3)


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_minimum_of_the_logistic_loss_is_ln2_minus_the_jsd_of_ordered_pairs(beta: float) -> None:
    """At the minimum e^m = P/Q with P = p_data⊗p_t the pair as it is and Q = p_t⊗p_data the pair swapped: the loss is
    E_P ln((P+Q)/P) = ln 2 − KL(P‖(P+Q)/2) = ln 2 − JSD(P‖Q), whatever β.

    Not ln 2 − JSD(p_data‖p_t): a pair tells more than one response, JSD(p_data‖p_t) ≤ JSD(P‖Q) ≤ 2·JSD(p_data‖p_t), so
    that (ln 2 − loss)/2, and not ln 2 − loss, is the lower bound of JSD(p_data‖p_t).
    """
    data, opponent = distribution(0), distribution(1)
    best = objective(spin_iteration(data, opponent, beta), data, opponent, beta=beta).item()
    as_is, swapped = ((p[:, None] + q[None, :]).flatten() for p, q in [(data, opponent), (opponent, data)])
    assert math.log(2) - best == pytest.approx(jsd(as_is, swapped), abs=1e-9)
    single = jsd(data, opponent)
    assert 1.5 * single < math.log(2) - best < 2 * single


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_theorem_5_2_slope_towards_the_data_is_beta_times_both_divergences(loss: str, beta: float) -> None:
    """d/ds of the objective at θ_t + s·log(p_data/p_t), s = 0, is β·ℓ'(0)·[KL(p_data‖p_t) + KL(p_t‖p_data)] < 0:
    wherever p_t ≠ p_data, SPIN moves, and towards the data. ℓ'(0) = −1/2 (logistic), −1 (the others).
    """
    data, opponent = distribution(0), distribution(1)
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective(opponent + s * (data - opponent), data, opponent, beta=beta, loss=loss), s)
    slope_at_0 = -0.5 if loss == "logistic" else -1.0
    expected = beta * slope_at_0 * (kl(data, opponent) + kl(opponent, data))
    assert slope.item() == pytest.approx(expected, rel=1e-10)
    assert expected < 0


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_theorem_5_2_an_opponent_equal_to_the_data_is_a_global_minimum(loss: str, beta: float) -> None:
    """p_t = p_data: margins have mean 0 for every policy, so E ℓ(m) ≥ ℓ(0) (Jensen), attained at θ_t, gradient 0."""
    data = distribution(0)
    at_start = data.clone().requires_grad_()
    value = objective(at_start, data, data, beta=beta, loss=loss)
    (gradient,) = torch.autograd.grad(value, at_start)
    assert gradient.abs().max() < 1e-15
    assert value.item() == pytest.approx(math.log(2) if loss == "logistic" else 1.0)
    for seed in range(20):
        elsewhere = objective(distribution(seed + 10, spread=2.0), data, data, beta=beta, loss=loss)
        assert elsewhere >= value - 1e-12


def test_generalised_fixed_point_with_reference_and_opponent_apart() -> None:
    """log p_{t+1} = log p_ref + (log p_data − log p_opponent)/β + const; the opponent is a mixture of two iterates
    (fictitious play).
    """
    data, reference, beta = distribution(0), distribution(1), 2.0
    opponent = torch.logaddexp(distribution(2), distribution(3)) - math.log(2)
    found = minimise(lambda x: objective(x, data, opponent, beta=beta, reference=reference), reference)
    expected = (reference + (data - opponent) / beta).log_softmax(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_alpha_spin_settles_between_data_and_base() -> None:
    """Reference p_t^α p_0^{1−α}: the error contracts by |α − 1/β| to p* ∝ p_data^w p_0^{1−w}, w = (1/β)/(1 − α + 1/β).
    α = 0.5, β = 2: factor 0 (one iteration), w = 1/2. The mixture's normaliser is left out: it cancels in the margin.
    """
    data, base, alpha, beta = distribution(0), distribution(1), 0.5, 2.0
    policy = base
    for _ in range(2):
        reference = alpha * policy + (1 - alpha) * base
        policy = minimise(
            lambda x, opponent=policy, reference=reference: objective(
                x, data, opponent, beta=beta, reference=reference
            ),
            policy,
        )
    torch.testing.assert_close(policy, ((data + base) / 2).log_softmax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "beta", "factor"), [(0.9, 2.0, 0.4), (0.5, 1.0, 0.5), (0.8, 5.0, 0.6), (0.0, 0.8, 1.25)]
)
def test_alpha_spin_contracts_by_alpha_minus_1_over_beta(alpha: float, beta: float, factor: float) -> None:
    """The error against p* ∝ p_data^w p_0^{1−w}, w = (1/β)/(1 − α + 1/β), is multiplied by |α − 1/β| per iteration:
    0.9 − 0.5, 0.5 − 1, 0.8 − 0.2; and 1.25 for α = 0, β = 0.8: a smaller β than SPIN's 1/2 is not what diverges here,
    but |α − 1/β| > 1.
    """
    data, base = distribution(0, spread=0.3), distribution(1, spread=0.3)
    weight = (1 / beta) / (1 - alpha + 1 / beta)
    settles = (weight * data + (1 - weight) * base).log_softmax(0)
    policy = distribution(2, spread=0.3)
    errors = [size(policy - settles)]
    for _ in range(3):
        reference = geometric_reference(policy, base, alpha)
        policy = minimise(
            lambda x, opponent=policy, reference=reference: objective(
                x, data, opponent, beta=beta, reference=reference
            ),
            policy,
        )
        errors.append(size(policy - settles))
    assert [after / before for before, after in pairwise(errors)] == pytest.approx([factor] * 3, rel=1e-3)


def play_exactly(data: Tensor, policy: Tensor, beta: float, iterations: int, *, fictitious: bool) -> list[Tensor]:
    """log p of every opponent, iterations solved exactly in closed form (the generalised fixed point above)."""
    mixture, opponents = policy.exp(), []
    for iteration in range(iterations):
        opponent = mixture.log() if fictitious else policy
        opponents.append(opponent)
        policy = (policy + (data - opponent) / beta).log_softmax(0)
        mixture = (mixture * (iteration + 1) + policy.exp()) / (iteration + 2)
    return opponents


def test_fictitious_play_settles_where_the_last_iterate_cycles() -> None:
    """β = 1/2: SPIN's error is multiplied by −1 for ever. Against the mixture of all iterates it dies out: with
    e' = −2ē and (tē)' = e in the limit of small errors, ē is a Bessel function that falls like t^{−3/4}.
    """
    data, start = distribution(0, spread=0.3), distribution(1, spread=0.3)
    first = size(data - start)
    last_iterate = play_exactly(data, start, 0.5, 400, fictitious=False)
    assert [size(data - opponent) for opponent in last_iterate] == pytest.approx([first] * 400, rel=1e-6)
    torch.testing.assert_close(last_iterate[398], start, rtol=0, atol=1e-9)
    mixtures = play_exactly(data, start, 0.5, 400, fictitious=True)
    assert max(size(data - opponent) for opponent in mixtures[300:]) < 0.05 * first


def test_fictitious_play_settles_where_the_last_iterate_diverges() -> None:
    """β = 0.4: the error of SPIN grows by 1.5 per iteration, that of the mixture dies out."""
    data, start = distribution(0, spread=0.3), distribution(1, spread=0.3)
    last_iterate = play_exactly(data, start, 0.4, 12, fictitious=False)
    assert size(data - last_iterate[-1]) == pytest.approx(1.5**11 * size(data - start), rel=1e-6)
    mixtures = play_exactly(data, start, 0.4, 400, fictitious=True)
    assert max(size(data - opponent) for opponent in mixtures[300:]) < 0.05 * size(data - start)


@pytest.mark.parametrize(("temperature", "beta", "factor"), [(1.5, 1.0, 1 / 3), (2.0, 1.0, 0.5), (2.0, 0.2, 1.5)])
def test_an_opponent_that_samples_at_temperature_t_ends_at_the_data_to_the_power_t(
    temperature: float, beta: float, factor: float
) -> None:
    """y' ~ p_t^{1/T} (a departure from the paper), reference p_t: log p_{t+1} = log p_t + (log p_data − log p_t / T)/β.
    Its fixed point is p ∝ p_data^T, sharper than people for T > 1; the error is multiplied by |1 − 1/(βT)|.
    """
    data, policy = distribution(0, spread=0.3), distribution(1, spread=0.3)
    settles = (temperature * data).log_softmax(0)
    errors = [size(policy - settles)]
    for _ in range(3):
        opponent = (policy / temperature).log_softmax(0)
        policy = minimise(
            lambda x, opponent=opponent, reference=policy: objective(x, data, opponent, beta=beta, reference=reference),
            policy,
        )
        errors.append(size(policy - settles))
    assert [after / before for before, after in pairwise(errors)] == pytest.approx([factor] * 3, rel=1e-3)


def preference_game(seed: int) -> Tensor:
    """P(i ≻ j) with P(j ≻ i) = 1 − P(i ≻ j); no order among the outcomes need exist."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(K, K, generator=generator, dtype=torch.float64)
    return torch.sigmoid(skew - skew.T)


def sppo_step(policy: Tensor, game: Tensor, eta: float) -> Tensor:
    """The minimiser of the square loss over exact samples of the policy: every outcome in both places of a pair."""
    wins = game @ policy.exp()

    def loss(logits: Tensor) -> Tensor:
        ratio = logits.log_softmax(0) - policy
        each = torch.stack(
            [square_loss(r, r, w, w, 1 / eta) for r, w in zip(ratio.split(1), wins.split(1), strict=True)]
        )
        return (policy.exp() * each).sum()

    return minimise(loss, policy)


def test_sppo_is_the_multiplicative_weights_update_up_to_its_normaliser() -> None:
    """p_{t+1} ∝ p_t e^{ηP}. The loss has ½η in place of log Z = ½η + O(η²), which moves every log-ratio r by O(η²)·e^r:
    alike up to O(η³), so halving η leaves an eighth of the difference.
    """
    policy, game = distribution(0), preference_game(1)
    misses = []
    for eta in (0.2, 0.1, 0.05):
        multiplicative = (policy + eta * (game @ policy.exp())).log_softmax(0)
        misses.append(size(sppo_step(policy, game, eta) - multiplicative))
        assert misses[-1] < 0.05 * size(multiplicative - policy)
    assert [before / after for before, after in pairwise(misses)] == pytest.approx([8, 8], rel=0.1)


def test_the_average_sppo_policy_can_hardly_be_beaten() -> None:
    """Multiplicative weights with step η in a symmetric game: after T rounds nothing beats the average policy by more
    than −log p_0 / (ηT) + η/8 (regret bound); the start can be beaten by far more.
    """
    game, policy, eta, rounds = preference_game(1), distribution(0), 0.1, 2000
    beaten_at_first = (game @ policy.exp()).max().item() - 0.5
    average = torch.zeros(K, dtype=torch.float64)
    for _ in range(rounds):
        average += policy.exp() / rounds
        policy = (policy + eta * (game @ policy.exp())).log_softmax(0)
    bound = -distribution(0).min().item() / (eta * rounds) + eta / 8  # −log p_0 of the best reply, log K if uniform
    assert (game @ average).max().item() - 0.5 < bound < beaten_at_first


def test_dpo_reads_rewards_off_preferences() -> None:
    """P(i ≻ j) = σ(r_i − r_j) on all pairs of outcomes: the minimiser is p ∝ p_ref e^{r/β} (DPO's equation 4)."""
    reference, reward, beta = distribution(1), distribution(0), 0.5
    wins = torch.sigmoid(reward[:, None] - reward[None, :]).flatten()
    better, worse = (index.flatten() for index in torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij"))

    def loss(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(0)
        margin = margins(policy[better], policy[worse], reference[better], reference[worse], beta)
        return (wins * MARGIN_FUNCTIONS["logistic"](margin)).sum()

    torch.testing.assert_close(minimise(loss, reference), (reference + reward / beta).log_softmax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_self_reinforcement_multiplies_what_fine_tuning_changed_by_1_plus_1_over_beta(beta: float) -> None:
    """y ~ p_t, y' ~ the model before fine-tuning b, reference p_t: log p_{t+1} = log p_t + (log p_t − log b)/β, so
    log(p_t/b) = (1 + 1/β)^t log(p_0/b). There is no fixed point but b: what stops it is early stopping and the filter.
    """
    before, policy = distribution(0, spread=0.3), distribution(1, spread=0.3)
    first = policy - before
    for iteration in (1, 2):
        policy = minimise(lambda x, now=policy: objective(x, now, before, beta=beta, reference=now), policy)
        expected = (before + (1 + 1 / beta) ** iteration * first).log_softmax(0)
        torch.testing.assert_close(policy, expected, rtol=0, atol=1e-5)


def test_seft_settles_where_the_reviser_changes_nothing_on_average() -> None:
    """Fine-tuning on revisions R(y″|y) of own answers makes p_{t+1} = p_t R, a Markov chain: it ends in R's stationary
    distribution, whatever the start, at the rate of R's second eigenvalue.
    """
    reviser = torch.stack([distribution(seed + 10) for seed in range(K)]).exp()
    policy = distribution(0)
    for _ in range(30):
        revised = policy.exp() @ reviser
        policy = minimise(lambda x, revised=revised: sft_loss(revised * x.log_softmax(0)), policy)
    torch.testing.assert_close(policy.exp() @ reviser, policy.exp(), rtol=0, atol=1e-6)
    eigenvalues, vectors = torch.linalg.eig(reviser.T)
    stationary = vectors[:, eigenvalues.abs().argmax()].real
    torch.testing.assert_close(policy.exp(), stationary / stationary.sum(), rtol=0, atol=1e-6)
    assert (distribution(0).exp() - policy.exp()).abs().max() > 0.05
