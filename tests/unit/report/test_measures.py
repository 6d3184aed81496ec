"""Measures of an iterate by hand, and the signs of a collapse."""

import math

import numpy as np
import pyarrow as pa
import pytest

from spin_ray.report.measures import (
    BY_KEY,
    MEASURES,
    stop_evidence,
)
from spin_ray.report.responses import distinct_ngrams, duplicate_share
from spin_ray.report.signs import RULES, Compared, warnings
from spin_ray.report.uncertainty import ROW_SCHEMA

HEALTHY = {
    "iterate": "sft",
    "against_opponent": {"loss": 0.5, "margin": 1.0, "accuracy": 0.8, "generated_logp_drift": -1.0},
    "against_self": {"loss": 0.6, "margin": 0.5, "generated_logp_drift": 0.5},
    "real_logp_drift": 0.2, "truncation_rate": 0.1, "identical_share": 0.1, "duplicate_share": 0.1,
    "real_duplicate_share": 0.1, "distinct_2": 0.8, "length_auc": 0.5,
    "standard_errors": {"against_self.generated_logp_drift": 0.2, "against_self.margin": 0.2},
}  # fmt: skip


def test_duplicates_are_what_an_earlier_response_said():
    assert duplicate_share([[1], [2], [3], [4]], [[1, 2], [3], [1, 2], [1, 2]]) == 0.5
    assert duplicate_share([[1], [1], [2]], [[1, 2], [1, 2], [3]]) == 0, "one prompt with two human responses"
    assert duplicate_share([[1], [2]], [[1], [2]]) == 0.0


def test_distinct_counts_different_pairs_within_responses_only():
    """[1 2 1 2]: 12, 21, 12; [2 1]: 21. Two of four; the border between responses is no pair."""
    assert distinct_ngrams([[1, 2, 1, 2], [2, 1]], 2) == 0.5
    assert distinct_ngrams([[1], []], 2) == 0.0


def test_an_interval_is_wide_as_its_standard_error_and_missing_without_one():
    measure = BY_KEY["against_self.generated_logp_drift"]
    assert measure.interval(HEALTHY) == pytest.approx((0.5 - 1.96 * 0.2, 0.5 + 1.96 * 0.2))
    assert BY_KEY["length_auc"].interval(HEALTHY) is None
    assert BY_KEY["answer_accuracy"].of(HEALTHY) is None


def test_the_interval_of_a_fraction_ends_at_0_and_1():
    """0.01 ± 1.96 · 0.02, of a share around its mean with four more draws; a loss has no such ends."""
    errors = dict.fromkeys(("distinct_2", "truncation_rate", "against_opponent.loss"), 0.02)
    evaluation = {
        "conversations": 96, "distinct_2": 0.01, "truncation_rate": 0.01, "against_opponent": {"loss": 0.01},
        "standard_errors": errors,
    }  # fmt: skip
    assert BY_KEY["distinct_2"].interval(evaluation) == pytest.approx((0.0, 0.0492))
    assert BY_KEY["distinct_2"].spread(evaluation) == "(0.00 to 0.05)"
    assert BY_KEY["truncation_rate"].interval(evaluation) == pytest.approx((0.0, 0.0296 + 0.0392))
    assert BY_KEY["against_opponent.loss"].interval(evaluation) == pytest.approx((-0.0292, 0.0492))
    assert BY_KEY["against_opponent.loss"].spread(evaluation) == "± 0.0392"
    assert BY_KEY["length_auc"].spread(evaluation) == ""
    unknown = {"truncation_rate": 0.01, "standard_errors": {"truncation_rate": math.nan}}
    assert BY_KEY["truncation_rate"].interval(unknown) is None


def test_every_measure_has_one_sentence_on_what_is_bad():
    assert len(BY_KEY) == len(MEASURES)
    for measure in MEASURES:
        assert measure.bad.endswith(".")
        assert measure.bad.count(". ") <= 1


def test_a_healthy_iterate_gives_no_warning():
    assert warnings(HEALTHY, [HEALTHY], {}, 512) == []


def test_a_model_that_has_arrived_at_the_data_did_not_overshoot():
    """Margins that spread around 0 have a loss above ln 2."""
    margins = np.random.default_rng(0).normal(0, 1, 1000)
    loss = float(np.log1p(np.exp(-margins)).mean())
    assert loss > 0.743
    assert warnings(HEALTHY | {"against_self": {"loss": loss, "margin": 0.048}}, [HEALTHY], {}, 512) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"against_opponent": {"loss": 0.70}}, "not below ln 2"),
        ({"against_self": {"margin": -1.0}}, "overshot"),
        ({"real_logp_drift": -3.0, "against_opponent": {"generated_logp_drift": -5.0}}, "goes to other responses"),
        ({"against_self": {"generated_logp_drift": -1.0}}, "estimated below 0"),
        ({"identical_share": 0.9}, "90% of y′ equal y"),
        ({"truncation_rate": 0.4}, "40% of y′ are cut at max_tokens (10% at sft)"),
        ({"duplicate_share": 0.5}, "50% of y′ repeat an earlier one (of y: 10%)"),
        ({"distinct_2": 0.4}, "distinct-2 fell to 0.40 from 0.80"),
        ({"length_auc": 0.03, "against_opponent": {"accuracy": 0.99}}, "length alone"),
    ],
)
def test_each_sign_of_collapse_is_named(change, words):
    [found] = warnings(HEALTHY | change, [HEALTHY], {}, 512)
    assert words in found


CHANGES = {
    "answers": lambda x: ({"answer_accuracy": 0.5 - x * 1.96 * 0.05 * math.sqrt(2)}, {"answer_accuracy": 0.5}),
    "held-out loss": lambda x: ({"against_opponent": {"loss": x}}, {}),
    "overshoot": lambda x: ({"against_self": {"margin": -x * 1.96 * 0.2}}, {}),
    "lost probability": lambda x: ({"real_logp_drift": -x, "against_opponent": {"generated_logp_drift": -9.0}}, {}),
    "KL below 0": lambda x: ({"against_self": {"generated_logp_drift": -x * 1.96 * 0.2}}, {}),
    "equal to y": lambda x: ({"identical_share": x}, {}),
    "cut": lambda x: ({"truncation_rate": 0.1 + x}, {}),
    "length": lambda x: ({"real_length": 10.0, "generated_length": 12.0 * x}, {"generated_length": 12.0}),
    "duplicates": lambda x: ({"duplicate_share": 0.1 + x}, {}),
    "wording": lambda x: ({"distinct_2": 0.8 * (1 - x)}, {}),
    "length alone": lambda x: ({"length_auc": 0.5 - x, "against_opponent": {"accuracy": 0.96}}, {}),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_begins_at_its_threshold(rule):
    errors = {"standard_errors": HEALTHY["standard_errors"] | {"answer_accuracy": 0.05}}
    for factor, expected in ((1.001, True), (0.999, False)):
        change, before = CHANGES[rule.name](rule.threshold * factor)
        before = HEALTHY | errors | before
        compared = Compared(HEALTHY | errors | change, before, None, 512)
        assert (rule.severity(compared) >= 1) is expected
        assert (rule.sentence(compared) in warnings(compared.evaluation, [before], {}, 512)) is expected


def test_the_demonstration_that_was_called_no_sign_of_collapse_names_cuts_and_lengths_worst_first():
    """Cuts from 2 % to 15 % are 2.6 times their threshold, lengths from 14.2 to 21.4 are 1.2 times theirs."""
    errors = {"truncation_rate": 0.02, "generated_length": 1.0}
    start = {
        "iterate": "sft",
        "truncation_rate": 0.02,
        "generated_length": 14.2,
        "real_length": 13.8,
        "standard_errors": errors,
    }
    found = warnings(start | {"truncation_rate": 0.15, "generated_length": 21.4}, [start], {}, 512)
    assert [sentence[:28] for sentence in found] == ["15% of y′ are cut at max_tok", "y′ went from 14.2 tokens at "]


def test_what_chance_may_give_and_what_comes_nearer_to_y_is_no_sign():
    errors = {"truncation_rate": 0.1, "generated_length": 1.0}
    start = {
        "iterate": "sft",
        "truncation_rate": 0.0,
        "generated_length": 20.0,
        "real_length": 10.0,
        "standard_errors": errors,
    }
    assert warnings(start | {"truncation_rate": 0.2, "generated_length": 10.0}, [start], {}, 512) == []


def test_a_fall_is_told_against_the_earlier_iterate_from_which_it_is_deepest():
    """25 %, 60 %, 40 %: better than sft, and worse than iter_000, as the same rows tell."""
    errors = {"standard_errors": {"answer_accuracy": 0.2}}
    sft, best, now = (
        {"iterate": name, "answer_accuracy": value} | errors
        for name, value in (("sft", 0.25), ("iter_000", 0.6), ("iter_001", 0.4))
    )
    rows = {"iter_000": rows_with(120), "iter_001": rows_with(80)}
    assert warnings(now, [sft, best], {}, 512) == [], "as if of different rows"
    [found] = warnings(now, [sft, best], rows, 512)
    assert "40.0% of the answers are right (60.0% at iter_000)" in found
    assert warnings(best, [sft], rows, 512) == []


def rows_with(right: int) -> pa.Table:
    """Returns 200 rows, the first ``right`` of them answered right."""
    rows = [
        {"prompt_id": f"p{number}", "conversation": number, "answer_accuracy": float(number < right),
         "truncation_rate": 0.0, "generated_length": 9.0}
        for number in range(200)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, ROW_SCHEMA)


def test_the_limit_that_more_answers_reach_is_named():
    [found] = warnings(HEALTHY | {"truncation_rate": 0.4}, [HEALTHY], {}, 512)
    assert found.endswith("(10% at sft): more answers reach the limit of 512 tokens, or that of model.max_length.")


# When to stop


def distances(*values: float | None) -> list[dict]:
    """Evaluations of θ_0, θ_1, …; the first has no opponent."""
    return [{"iterate": f"i{n}", "opponent": f"i{n - 1}", "jsd_lower_bound": value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("found", "patience", "min_fall", "stops"),
    [
        ((None,), 1, 0.0, False),
        ((None, 0.5), 1, 0.0, False),  # nothing to compare with
        ((None, 0.5, 0.2), 1, 0.0, False),
        ((None, 0.5, 0.2, 0.3), 1, 0.0, True),
        ((None, 0.5, 0.5), 1, 0.0, True),  # level is no fall
        ((None, 0.5, 0.45), 1, 0.1, True),  # a fall, but a small one
        ((None, 0.5, 0.2, 0.3), 2, 0.0, False),  # one bad iteration is forgiven
        ((None, 0.2, 0.3, 0.3), 2, 0.0, True),
        ((None, 0.2, 0.3, 0.1), 2, 0.0, False),
    ],
)
def test_a_run_stops_when_the_distance_has_not_fallen_for_as_long_as_it_is_patient(found, patience, min_fall, stops):
    assert (stop_evidence(distances(*found), patience, min_fall) is not None) == stops


def test_the_evidence_names_the_iterate_that_was_closest():
    """The evaluation of i2 measures its opponent i1."""
    found = stop_evidence(distances(None, 0.5, 0.2, 0.3), patience=1, min_fall=0.0)
    assert found["closest"] == "i1"
    assert found["distances"] == {"i0": 0.5, "i1": 0.2, "i2": 0.3}
