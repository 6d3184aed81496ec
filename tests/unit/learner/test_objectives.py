"""Objectives of a whole pack: gradients by finite differences, and what each part of them means."""

import math
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from spin_ray.learner.backends.base import StepStats
from spin_ray.learner.losses import LOSSES, geometric_reference, segment_lengths, square_loss
from spin_ray.learner.metrics import step_metrics
from spin_ray.learner.packing import build_pack, plan_epoch
from spin_ray.learner.step import Objective, PackShape, ReferenceScores, _history, _pack_loss, feed
from spin_ray.run_dir.schemas import TOKEN_IDS
from tests.support.learner_cases import Row, lengths_of, table_of

torch.set_num_threads(1)
ROWS: list[Row] = [([5, 6], [7, 2], [8]), ([5, 6], [7, 2], [9, 9, 2]), ([4], [3, 2, 1, 2], [6, 2])]
LOGPS = torch.tensor([-1.3, -2.1, -0.4, -3.2, -1.7], dtype=torch.float64)
"""One a segment: y, y', y' of the first prompt, then y, y' of the other."""


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REFERENCE = ReferenceScores(
    real=double(-1.1, -1.1, -2.9), generated=double(-2.3, -0.3, -1.6), real_win=double(0.9, 0.8, 0.7),
    generated_win=double(0.1, 0.3, 0.4),
)  # fmt: skip


def loss_of(objective: Objective, logps: Tensor, reference: ReferenceScores = REFERENCE) -> Tensor:
    return pack_loss(objective, logps, reference)[0]


def pack_loss(objective: Objective, logps: Tensor, reference: ReferenceScores | None) -> tuple[Tensor, dict[str, Any]]:
    """The pack's share of the loss, and its sums."""
    (step,) = plan_epoch(lengths_of(ROWS), pack_length=24, global_batch_pairs=3, seed=0, epoch=0)
    (pack,) = step.packs
    shape = PackShape(pack_length=24, global_batch_pairs=3, pad_id=0)
    # Segments are numbered in pack order, which puts the larger tree first.
    order = [0, 1, 2, 3, 4] if pack[0][0] == 0 else [3, 4, 0, 1, 2]
    backend = SimpleNamespace(device=torch.device("cpu"), logps=lambda batch: logps[order])
    ((tokens, batch),) = feed((pack,), table_of(ROWS), shape, backend.device)
    share, sums = _pack_loss(backend, batch, step, objective, reference)  # type: ignore[arg-type]
    return share, sums | {"tokens": tokens}


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_every_objective_by_central_differences(
    loss: str | None, sft_weight: float, length_normalised: bool
) -> None:
    """(L(x + h) − L(x − h)) / 2h with h = 1e-6, for each of the five log-probabilities."""
    objective = Objective(loss=loss, beta=0.8, sft_weight=sft_weight, length_normalised=length_normalised)
    logps = LOGPS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(objective, logps), logps)
    h = 1e-6
    slopes = [
        ((loss_of(objective, LOGPS + h * unit) - loss_of(objective, LOGPS - h * unit)) / (2 * h)).item()
        for unit in torch.eye(5, dtype=torch.float64)
    ]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    assert gradient.abs().max() > 0.01


def test_a_length_normalised_margin_divides_each_log_ratio_by_its_own_tokens() -> None:
    """Pair 2: y of 4 tokens −3.2 − −2.9 = −0.3, y' of 2 tokens −1.7 − −1.6 = −0.1: −0.075 + 0.05 = −0.025, times β 2.
    Pair 0: y (2 tokens) −0.2/2, y' (1 token) 0.2/1: −0.3. Pair 1: −0.1 − (−0.1)/3. ℓ(m) = 1 − m, mean of three.
    """
    objective = Objective(loss="correlation", beta=2.0, length_normalised=True)
    margins = [-0.6, 2 * (-0.1 + 0.1 / 3), -0.05]
    assert loss_of(objective, LOGPS).item() == pytest.approx(1 - sum(margins) / 3, abs=1e-6)


def test_segment_lengths_count_response_tokens() -> None:
    assert segment_lengths(build_pack(((0, 1), (2,)), table_of(ROWS), pack_length=24, pad_id=0)).tolist() == [
        2, 1, 3, 4, 2,
    ]  # fmt: skip


def test_a_geometric_reference_is_linear_in_log_probabilities() -> None:
    """0.25 · −1 + 0.75 · −3 = −2.5; α = 1 is the last iterate, α = 0 the base."""
    last, base = double(-1.0), double(-3.0)
    assert [geometric_reference(last, base, alpha).item() for alpha in (1.0, 0.25, 0.0)] == [-1.0, -2.5, -3.0]


def test_mixing_with_the_base_gives_the_margin_of_alpha_spin() -> None:
    """The loss under the mixed reference is that of the mixed scores by hand."""
    base = ReferenceScores(real=double(-4, -4, -5), generated=double(-1, -2, -3))
    mixed = REFERENCE.mixed_with(base, 0.5)
    by_hand = ReferenceScores(
        real=(REFERENCE.real + base.real) / 2, generated=(REFERENCE.generated + base.generated) / 2
    )
    objective = Objective(loss="logistic", beta=1.0)
    assert loss_of(objective, LOGPS, mixed).item() == loss_of(objective, LOGPS, by_hand).item()
    assert loss_of(objective, LOGPS, mixed).item() != loss_of(objective, LOGPS).item()


def test_the_drift_of_log_p_is_since_the_iteration_began_whatever_the_reference() -> None:
    """θ is θ_t itself: no drift, though the reference is half θ_0."""
    base = ReferenceScores(real=double(-4, -4, -5), generated=double(-1, -2, -3))
    mixed = ReferenceScores(real=LOGPS[[0, 0, 3]], generated=LOGPS[[1, 2, 4]]).mixed_with(base, 0.5)
    assert pack_loss(Objective(loss="logistic"), LOGPS, mixed)[1]["real_logp_drift"] == 0


def test_the_square_loss_by_hand() -> None:
    """β 0.5: targets are 2(0.9 − 0.5) = 0.8 and 2(0.2 − 0.5) = −0.6; ½[(0.3 − 0.8)² + (0.4 + 0.6)²] = 0.625."""
    assert square_loss(double(0.3), double(0.4), double(0.9), double(0.2), 0.5).item() == pytest.approx(0.625)


def test_the_square_loss_is_0_where_both_ratios_are_their_targets() -> None:
    assert square_loss(double(0.8), double(-0.6), double(0.9), double(0.2), 0.5).item() == pytest.approx(0.0)


def test_an_objective_without_what_it_needs_is_an_error() -> None:
    bare = ReferenceScores(real=REFERENCE.real, generated=REFERENCE.generated)
    with pytest.raises(ValueError, match="win probabilities"):
        loss_of(Objective(loss="square"), LOGPS, bare)
    with pytest.raises(ValueError, match="reference scores"):
        loss_of(Objective(loss="logistic"), LOGPS, None)  # type: ignore[arg-type]


def test_supervised_fine_tuning_needs_no_reference() -> None:
    """−(−1.3 − 1.3 − 3.2) over 2 + 2 + 4 real tokens."""
    assert loss_of(Objective(loss=None), LOGPS, None).item() == pytest.approx(5.8 / 8)  # type: ignore[arg-type]


def test_margins_of_policy_equal_to_reference_are_0() -> None:
    same = ReferenceScores(real=double(-1.3, -1.3, -3.2), generated=double(-2.1, -0.4, -1.7))
    for normalised in (False, True):
        objective = Objective(loss="logistic", beta=5.0, length_normalised=normalised)
        assert loss_of(objective, LOGPS, same).item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_logged_of_a_step(loss: str | None) -> None:
    """Of SFT the loss and log p(y); of others also log p(y'), and of a reference the margin and the drift from it."""
    (step,) = plan_epoch(lengths_of(ROWS), pack_length=24, global_batch_pairs=3, seed=0, epoch=0)
    refers = LOSSES[loss].needs_reference
    _, sums = pack_loss(Objective(loss=loss), LOGPS, REFERENCE if refers else None)
    logged = step_metrics(sums, step, LOSSES[loss], StepStats(grad_norm=2.0, learning_rate=0.5))
    of_pairs = ["generated_logp"] if loss else []
    if refers:
        of_pairs = ["margin", "accuracy", *of_pairs, "real_logp_drift"]
    assert list(logged) == ["loss", *of_pairs, "real_logp", "grad_norm", "lr", "tokens"]
    assert (logged["grad_norm"], logged["lr"], logged["tokens"]) == (2.0, 0.5, 15)
    assert logged["real_logp"] == pytest.approx((-1.3 - 1.3 - 3.2) / 3)
    if loss is None:
        assert logged["loss"] == pytest.approx(5.8 / 8)
    if loss is not None:
        assert logged["generated_logp"] == pytest.approx((-2.1 - 0.4 - 1.7) / 3)
    if refers:  # margins (−0.2 − 0.2), (−0.2 + 0.1), (−0.3 + 0.1); drift −0.2, −0.2, −0.3
        assert (logged["margin"], logged["accuracy"]) == (pytest.approx(-0.7 / 3), 0.0)
        assert logged["real_logp_drift"] == pytest.approx(-0.7 / 3)


@pytest.mark.parametrize("length_normalised", [False, True])
def test_t_spins_history_compares_the_opponents_response_with_the_first_models(length_normalised: bool) -> None:
    """Equation 7 of arXiv 2601.08198 for one row: y of 2 tokens, y′ of 3, y_0 of 1; a row without y′ has no loss."""
    objective = Objective(loss="reference_free", beta=0.8, history_weight=0.3, length_normalised=length_normalised)
    logps, lengths = double(-1.3, -2.1, -0.4), (2, 3, 1) if length_normalised else (1, 1, 1)
    real, generated, initial = (value / length for value, length in zip(logps.tolist(), lengths, strict=True))
    expected = math.log1p(math.exp(-0.8 * (real - generated))) + 0.3 * math.log1p(
        math.exp(-0.8 * (generated - initial))
    )
    for row, found in (([5, 6], [7, 2], [8, 3, 2]), expected), (([5, 6], [7, 2], []), math.nan):
        table = table_of([row]).append_column("initial_ids", pa.array([[9]], TOKEN_IDS))
        batch = build_pack(((0,),), table, pack_length=16, pad_id=0)
        (step,) = plan_epoch(lengths_of([row]), pack_length=16, global_batch_pairs=1, seed=0, epoch=0)
        backend: Any = SimpleNamespace(logps=lambda batch: logps[: batch.num_segments])
        share, _ = _pack_loss(backend, batch, step, objective, None)
        assert share.item() == pytest.approx(found, nan_ok=True)
        assert _history(objective, objective.resolve(), backend.logps(batch), batch).isnan() == math.isnan(found)
