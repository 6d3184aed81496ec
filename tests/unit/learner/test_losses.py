"""The losses, by hand and by finite differences."""

import math

import pytest
import torch

from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.losses import MARGIN_FUNCTIONS, margins, pair_logps, response_logps, sft_loss, spin_loss
from spin_ray.learner.packing import build_pack
from tests.support.learner_cases import Row, table_of

torch.set_num_threads(1)
SLOPE_AT_0 = {"logistic": -0.5, "hinge": -1.0, "exponential": -1.0, "correlation": -1.0}


def two_samples_and_an_sft_row() -> PackedBatch:
    """Segments: 0 real, 1 and 2 generated of the first prompt; 3 real of a prompt without y'."""
    rows: list[Row] = [([5, 6], [7, 2], [8]), ([5, 6], [7, 2], [9, 2]), ([4], [3, 2], [])]
    return build_pack(((0, 1), (2,)), table_of(rows), pack_length=12, pad_id=0)


def test_log_probability_of_a_response_is_the_sum_over_its_tokens() -> None:
    """Segment 0: −1 −2 = −3; segment 1: −4; segment 2 has no target: 0."""
    found = response_logps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 3)
    assert found.tolist() == [-3.0, -4.0, 0.0]


def test_log_probabilities_are_added_in_fp32() -> None:
    """300 tokens of −1 nat: bf16 cannot count past 256."""
    found = response_logps(torch.full((300,), -1.0, dtype=torch.bfloat16), torch.zeros(300, dtype=torch.long), 1)
    assert found.dtype == torch.float32
    assert found.tolist() == [-300.0]


def test_log_probability_of_no_responses_is_empty_but_differentiable() -> None:
    logps = response_logps(torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.long), 0)
    assert logps.shape == (0,)
    assert logps.requires_grad


def test_pairs_of_one_tree_share_the_real_response_and_a_row_without_generated_has_nan() -> None:
    real, generated = pair_logps(torch.tensor([-1.0, -2.0, -3.0, -4.0]), two_samples_and_an_sft_row())
    assert real.tolist() == [-1.0, -1.0, -4.0]
    assert generated[:2].tolist() == [-2.0, -3.0]
    assert generated[2].isnan()


def test_margin_is_beta_times_the_difference_of_the_log_ratios() -> None:
    """0.5 · ((−3 − −4) − (−7 − −5)) = 0.5 · (1 + 2) = 1.5: y became likelier, y' less likely."""
    values = (torch.tensor([value]) for value in (-3.0, -7.0, -4.0, -5.0))
    assert margins(*values, beta=0.5).tolist() == [1.5]


@pytest.mark.parametrize(
    ("name", "at_0", "at_2", "at_minus_1"),
    [
        ("logistic", math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.e)),
        ("hinge", 1.0, 0.0, 2.0),
        ("exponential", 1.0, math.exp(-2), math.e),
        ("correlation", 1.0, -1.0, 2.0),
    ],
)
def test_loss_values(name: str, at_0: float, at_2: float, at_minus_1: float) -> None:
    found = MARGIN_FUNCTIONS[name](torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([at_0, at_2, at_minus_1], abs=1e-12)


@pytest.mark.parametrize("name", MARGIN_FUNCTIONS)
def test_losses_satisfy_assumption_5_1(name: str) -> None:
    """Convex, non-increasing, ℓ'(0) < 0; slopes by central differences with h = 1e-5 in float64."""
    grid = torch.linspace(-6, 6, 400, dtype=torch.float64)  # does not contain the hinge's kink at 1
    h = 1e-5
    slope = (MARGIN_FUNCTIONS[name](grid + h) - MARGIN_FUNCTIONS[name](grid - h)) / (2 * h)
    assert (slope <= 0).all()
    assert (slope.diff() >= -1e-9).all()
    at_0 = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(MARGIN_FUNCTIONS[name](at_0).sum(), at_0)
    assert exact.item() == pytest.approx(SLOPE_AT_0[name])
    grid.requires_grad_()
    (gradient,) = torch.autograd.grad(MARGIN_FUNCTIONS[name](grid).sum(), grid)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-6)


def test_logistic_loss_survives_margins_of_hundreds_of_nats() -> None:
    """ℓ(−400) = 400 + log(1 + e^−400) = 400, where e^400 overflows; the slope there is −1."""
    margin = torch.tensor([-400.0, 400.0], requires_grad=True)
    loss = spin_loss(margin, MARGIN_FUNCTIONS["logistic"])
    loss.backward()
    assert loss.item() == 400.0
    assert margin.grad is not None
    assert margin.grad.tolist() == [-1.0, 0.0]


def test_losses_are_sums_so_that_unequal_packs_add_up_to_the_step() -> None:
    """ℓ of (0 | 1, 2) over two packs, divided by 3 pairs: (1 + 0 − 1)/3 = 0. Means per pack would give (1 − 0.5)/2."""
    packs = torch.tensor([0.0]), torch.tensor([1.0, 2.0])
    assert sum(spin_loss(pack, MARGIN_FUNCTIONS["correlation"]).item() for pack in packs) / 3 == 0.0


def test_sft_loss_counts_a_shared_real_response_once_for_each_pair() -> None:
    """−(−1 −1 −4) = 6 over 2 + 2 + 2 real tokens: 1 nat per token, as if the rows had not been packed together."""
    real, _ = pair_logps(torch.tensor([-1.0, -2.0, -3.0, -4.0]), two_samples_and_an_sft_row())
    assert sft_loss(real).item() / 6 == 1.0
