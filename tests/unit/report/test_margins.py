"""Margins, their concentration and the distance from the base, by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from spin_ray.report.margins import SCORE_SCHEMA, margin_concentrations, margin_measures
from spin_ray.report.uncertainty import CONFIDENCE

ALONE = {name: number for number, name in enumerate(["a", "b", "x", *map(str, range(2000))])}
"""Number of each prompt's conversation."""


def scores_of(rows: list[tuple[str, str, float, float]]) -> pa.Table:
    """(pair, model, log p(y), log p(y′)); every response is one token."""
    return pa.Table.from_pylist(
        [dict(zip(SCORE_SCHEMA.names, (*row, [row[2]], [row[3]]), strict=True)) for row in rows], SCORE_SCHEMA
    )


def test_margins_by_hand():
    """β = ½; y gained 2 nats in a, lost 1 in b.

    against the opponent: a ½ (2 − −4) = 3, b ½ (−1 − 1) = −1; against itself: a ½ (2 − 0) = 1, b ½ (−1 − −3) = 1
    """
    scores = scores_of(
        [
            ("a/opponent", "sft", -10, -20), ("a/opponent", "iter_000", -8, -24),
            ("b/opponent", "sft", -10, -20), ("b/opponent", "iter_000", -11, -19),
            ("a/self", "sft", -10, -30), ("a/self", "iter_000", -8, -30),
            ("b/self", "sft", -10, -30), ("b/self", "iter_000", -11, -33),
        ]
    )  # fmt: skip
    found = margin_measures(scores, "iter_000", "sft", "sft", beta=0.5, groups=ALONE)
    errors = found.pop("standard_errors")
    of_two = stats.t.ppf(0.975, 1) / CONFIDENCE
    assert errors["against_opponent.margin"] == pytest.approx(2.0 * of_two)  # 3 and −1: variance 8 over two rows
    assert errors["real_logp_drift"] == pytest.approx(1.5 * of_two)  # 2 and −1
    loss = (math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2
    assert found == {
        "beta": 0.5,
        "length_normalised": False,
        "real_logp_drift": pytest.approx(0.5),
        "against_opponent": {
            "loss": pytest.approx(loss), "margin": pytest.approx(1.0), "accuracy": 0.5,
            "generated_logp_drift": pytest.approx(-1.5),
            "margin_concentration": pytest.approx((4 / 6 + 1 / 2) / 2),  # 4 of 2 + 4, 1 of 1 + 1
        },
        "against_self": {
            "loss": pytest.approx(math.log1p(math.exp(-1))), "margin": pytest.approx(1.0),
            "generated_logp_drift": pytest.approx(-1.5),
        },
        "jsd_lower_bound": pytest.approx((math.log(2) - loss) / 2),
        "kl_to_base": pytest.approx(-1.5),  # the base is the opponent here
    }  # fmt: skip


def test_margins_per_token_are_those_of_the_length_normalised_objective():
    """β = 10; y gained 2 nats in 4 tokens and y′ lost 3 in 1: 10 (2/4 + 3/1) = 35. The empty y′ of b counts 0."""
    rows = [
        ("a", "sft", [-2.0] * 4, [-1.0]), ("a", "iter_000", [-1.5] * 4, [-4.0]),
        ("b", "iter_000", [-1.0] * 2, []), ("b", "sft", [-2.0] * 2, []),
    ]  # fmt: skip
    scores = pa.Table.from_pylist(
        [
            {"pair_id": f"{prompt}/{whose}", "model": model, "real_logp": sum(real), "generated_logp": sum(generated),
             "real_token_logps": real, "generated_token_logps": generated}
            for whose in ("self", "opponent") for prompt, model, real, generated in rows
        ],
        SCORE_SCHEMA,
    )  # fmt: skip
    found = margin_measures(scores, "iter_000", "sft", "sft", beta=10.0, per_token=True, groups=ALONE)
    assert found["against_opponent"]["margin"] == pytest.approx((35 + 10) / 2)
    assert found["real_logp_drift"] == pytest.approx(2.0), "drifts stay sums"
    assert found["length_normalised"] is True
    assert margin_measures(scores, "iter_000", "sft", "sft", beta=10.0, groups=ALONE)["length_normalised"] is False


def test_a_model_equal_to_its_opponent_has_loss_ln_2_and_is_no_distance_away():
    scores = scores_of(
        [(f"a/{whose}", name, -3.5, -7.25) for whose in ("self", "opponent") for name in ("sft", "iter_000")]
    )
    found = margin_measures(scores, "iter_000", "sft", "sft", beta=5.0, groups=ALONE)
    assert found["against_opponent"]["loss"] == pytest.approx(math.log(2))
    assert found["against_opponent"]["margin"] == 0
    assert found["jsd_lower_bound"] == pytest.approx(0, abs=1e-12)
    assert "margin_concentration" not in found["against_opponent"]


def test_margins_of_hundreds_of_nats_do_not_overflow():
    """log(1 + e^2000) = 2000."""
    rows = [
        (f"a/{whose}", name, real, 0.0)
        for whose in ("self", "opponent")
        for name, real in (("sft", 0.0), ("iter_000", -2000.0))
    ]
    found = margin_measures(scores_of(rows), "iter_000", "sft", "sft", beta=1.0, groups=ALONE)
    assert found["against_self"]["loss"] == 2000.0


def test_the_distance_from_the_base_is_the_kl_divergence_of_the_iterate_from_it():
    """One token of four, sampled from p; the base has q. KL(p ‖ q) by its definition, the estimate within 4 of its
    standard errors; the opponent, a third model, has no part in it.
    """
    p, q = np.array([0.5, 0.25, 0.2, 0.05]), np.array([0.1, 0.2, 0.3, 0.4])
    drawn = np.random.default_rng(0).choice(4, size=2000, p=p)
    rows = [("x/opponent", "iter_001", -1.0, -1.0), ("x/opponent", "iter_000", -1.5, -2.0)]
    for number, token in enumerate(drawn):
        rows += [(f"{number}/self", name, -1.0, math.log(own[token])) for name, own in (("iter_001", p), ("sft", q))]
        rows += [(f"{number}/self", "iter_000", -1.0, -3.0)]
    found = margin_measures(scores_of(rows), "iter_001", "iter_000", "sft", beta=1.0, groups=ALONE)
    error = found["standard_errors"]["kl_to_base"]
    assert abs(found["kl_to_base"] - float((p * np.log(p / q)).sum())) < 4 * error
    assert error == pytest.approx(np.std(np.log(p / q)[drawn], ddof=1) / math.sqrt(2000), rel=1e-3)


def test_concentration_is_the_part_of_the_largest_tenth_of_the_tokens():
    """Of 20 tokens the two largest changes, 5 (of y, −5) and 4 (of y′), of 5 + 4 + 18 · ½ = 18 in all."""
    real, generated = [-1.0] * 10, [-2.0] * 10
    moved_real = [-6.0, *[-1.5] * 9]
    moved_generated = [*[-2.5] * 9, 2.0]
    scores = pa.Table.from_pylist(
        [
            {"pair_id": "a/opponent", "model": "sft", "real_token_logps": real, "generated_token_logps": generated},
            {"pair_id": "a/opponent", "model": "iter_000", "real_token_logps": moved_real,
             "generated_token_logps": moved_generated},
        ],
        SCORE_SCHEMA,
    )  # fmt: skip
    assert margin_concentrations(scores, "iter_000", "sft") == {"a/opponent": pytest.approx(0.5)}
    assert margin_concentrations(scores, "sft", "sft") == {}
