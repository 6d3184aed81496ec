"""Standard errors beside SciPy's, and by simulations in which the truth is known."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from spin_ray.report.uncertainty import (
    CHANGE_OF_SHARE,
    CONFIDENCE,
    ROW_SCHEMA,
    SHARE,
    Change,
    changes_by_row,
    conversation_groups,
    interval_of_share,
    standard_error,
)


def half(values: np.ndarray) -> float:
    """Half of SciPy's 95 % interval of the mean of independent rows."""
    return stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)


@pytest.mark.parametrize("rows", [2, 5, 50])
def test_the_interval_of_independent_rows_is_scipys(rows):
    values = np.random.default_rng(0).normal(size=rows)
    assert CONFIDENCE * standard_error(values) == pytest.approx(half(values))
    assert CONFIDENCE * standard_error(values, list(range(rows))) == pytest.approx(half(values))


def test_the_error_of_many_rows_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=20_000)
    assert standard_error(values) == pytest.approx(stats.sem(values), rel=1e-4)


def test_one_row_or_one_conversation_tells_no_error():
    assert standard_error(np.array([1.0])) is None
    assert standard_error(np.array([1.0, 2.0]), [7, 7]) is None
    assert standard_error(np.array([]), added=SHARE) is None


def test_rows_of_one_conversation_count_as_one_draw():
    """Equal rows within each of four conversations tell no more than the four do."""
    four = np.array([0.0, 1.0, 5.0, 2.0])
    assert CONFIDENCE * standard_error(np.repeat(four, 3), np.repeat([9, 2, 4, 7], 3)) == pytest.approx(half(four))


@pytest.mark.parametrize("sizes", [[50, 50, *[1] * 30], [30, 30, 30, *[2] * 20], [40, *[1] * 100]])
def test_intervals_hold_the_truth_where_few_conversations_have_most_rows(sizes):
    """By the number of conversations alone, 67 to 90 % would hold it."""
    random, covered = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(1000):
        values = random.normal(size=len(sizes))[groups] + random.normal(size=len(groups))
        covered += abs(values.mean()) < CONFIDENCE * standard_error(values, groups)
    assert 910 <= covered <= 975


def test_a_conversation_with_nearly_all_rows_tells_no_error():
    assert standard_error(np.arange(120.0), [0] * 100 + list(range(1, 21))) is None


@pytest.mark.parametrize("conversations", [3, 60])
def test_intervals_of_dependent_rows_hold_the_truth_as_often_as_they_say(conversations):
    """Three turns each, half of the variance between conversations. As independent rows, 85 % would hold it."""
    random, covered = np.random.default_rng(0), {"conversations": 0, "rows": 0}
    groups = np.repeat(np.arange(conversations), 3)
    for _ in range(1000):
        values = random.normal(size=conversations)[groups] + random.normal(size=3 * conversations)
        for name, numbers in (("conversations", groups), ("rows", None)):
            covered[name] += abs(values.mean()) < CONFIDENCE * standard_error(values, numbers)
    assert 930 <= covered["conversations"] <= 965
    assert covered["rows"] < 890


@pytest.mark.parametrize(("right", "within"), [(0, 0.02), (1, 0.02), (30, 0.01), (99, 0.02), (100, 0.02)])
def test_the_interval_of_a_share_is_near_wilsons_also_for_none_and_all(right, within):
    found = interval_of_share(right / 100, standard_error(np.arange(100) < right, added=SHARE), 100)
    wilson = stats.binomtest(right, 100).proportion_ci(method="wilson")
    assert found == pytest.approx((wilson.low, wilson.high), abs=within)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.15, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("rows", [10, 48, 400])
def test_intervals_of_shares_hold_the_truth_as_often_as_they_say(share, rows):
    """Exactly, over all numbers of right rows. Around the share itself, 91 % would hold 0.3 of 48 rows."""
    held = 0.0
    for right in range(rows + 1):
        low, high = interval_of_share(right / rows, standard_error(np.arange(rows) < right, added=SHARE), rows)
        held += stats.binom.pmf(right, rows, share) * (low <= share <= high)
    assert held > 0.94


@pytest.mark.parametrize(
    ("conversations", "windows", "share"), [(10, 20, 0.9), (30, 20, 0.95), (10, 20, 0.5), (100, 5, 0.98)]
)
def test_intervals_of_shares_of_conversations_hold_the_truth_as_often_as_they_say(conversations, windows, share):
    """All windows of a conversation are right, or none: the share of ``conversations`` independent draws."""
    groups, held = np.repeat(np.arange(conversations), windows), 0.0
    for right in range(conversations + 1):
        values = groups < right
        low, high = interval_of_share(values.mean(), standard_error(values, groups, SHARE), conversations)
        alone = np.arange(conversations) < right
        expected = interval_of_share(alone.mean(), standard_error(alone, added=SHARE), conversations)
        assert (low, high) == pytest.approx(expected)
        held += stats.binom.pmf(right, conversations, share) * (low <= share <= high)
    assert held > 0.94


# Conversations


def conversation(*contents: str) -> str:
    roles = ["user", "assistant"] * len(contents)
    return json.dumps([{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)])


def groups_of(*messages: str) -> list[int]:
    ids = [f"p{number}" for number in range(len(messages))]
    rows = pa.table({"prompt_id": ids, "messages": messages, "conversation_id": pa.nulls(len(ids), pa.string())})
    return list(conversation_groups(rows).values())


def test_turns_of_a_conversation_and_answers_to_one_prompt_belong_together():
    assert groups_of(
        conversation("hi", "hello"),
        conversation("hi", "hello", "how are you?", "fine"),
        conversation("hi", "hello", "how are you?", "fine", "bye", "bye"),
        conversation("hi", "another answer"),
        conversation("hi", "unknown start", "how are you?", "fine"),
        conversation("tea?", "yes"),
    ) == [0, 0, 0, 0, 1, 2]


def test_rows_of_one_conversation_id_belong_together_whatever_they_say():
    """Windows of a conversation, which do not begin with each other, and another answer to the prompt of one."""
    messages = [
        conversation("hi", "hello"),
        conversation("how?", "so"),
        conversation("hi", "you"),
        conversation("a", "b"),
    ]
    rows = pa.table({"prompt_id": list("pqrs"), "messages": messages, "conversation_id": ["c", "c", None, "d"]})
    assert list(conversation_groups(rows).values()) == [0, 0, 0, 1]


def test_a_conversation_whose_first_turn_is_not_there_is_known_by_its_second():
    later = conversation("hi", "hello", "how are you?", "fine")
    assert groups_of(later, conversation("hi", "hello", "how are you?", "fine", "bye", "bye"), later) == [0, 0, 0]


# Changes


def rows_of(accuracies: list[float | None], first: int = 0) -> pa.Table:
    rows = [
        {"prompt_id": f"p{number}", "conversation": number, "answer_accuracy": value, "truncation_rate": 0.0,
         "generated_length": 5.0 + number}
        for number, value in enumerate(accuracies, first)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, ROW_SCHEMA)


def test_a_change_on_the_same_rows_has_the_error_of_the_paired_test():
    """SciPy's paired t-test, of lengths that differ much between rows and little between models."""
    random = np.random.default_rng(0)
    before = rows_of([None] * 40)
    longer = before["generated_length"].to_numpy() + random.normal(1, 0.5, 40)
    now = before.set_column(4, "generated_length", pa.array(longer)).take(random.permutation(40))
    found = changes_by_row(before, now)
    assert "answer_accuracy" not in found
    value, error = found["generated_length"]["value"], found["generated_length"]["standard_error"]
    paired = stats.ttest_rel(longer, before["generated_length"].to_numpy())
    assert CONFIDENCE * error == pytest.approx(value - paired.confidence_interval(0.95).low)


def test_a_change_of_a_share_leaves_out_rows_that_one_side_lacks():
    """Of p1 to p3, one became right; Bonett and Price add −1 and 1 to the differences 0, 1, 0, whose mean is then ⅕."""
    found = changes_by_row(rows_of([1.0, 0.0, 0.0, 1.0, None]), rows_of([0.0, 1.0, 1.0, 1.0], first=1))[
        "answer_accuracy"
    ]
    assert found["value"] == pytest.approx(1 / 3)
    added = standard_error(np.array([0.0, 1.0, 0.0]), added=CHANGE_OF_SHARE)
    assert found["value"] / found["standard_error"] == pytest.approx(1 / 5 / added)


def test_intervals_of_a_change_hold_the_truth_as_often_as_they_say():
    """Hard and easy questions, no change: 95 of 100 intervals hold 0, and they are a quarter narrower than unpaired."""
    random, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(500):
        chance = random.beta(0.5, 0.5, 80)
        before, now = ((random.random(80) < chance).astype(float) for _ in range(2))
        found = changes_by_row(rows_of(list(before)), rows_of(list(now)))["answer_accuracy"]
        covered += abs(found["value"]) < CONFIDENCE * found["standard_error"]
        unpaired = np.hypot(*(standard_error(each, added=SHARE) for each in (before, now)))
        widths.append(found["standard_error"] / unpaired)
    assert 465 <= covered <= 490
    assert np.mean(widths) < 0.77


def test_a_stored_change_counts_only_against_the_iterate_that_it_is_of():
    errors = {"standard_errors": {"answer_accuracy": 0.03}}
    start, other = ({"iterate": name, "answer_accuracy": 0.25} | errors for name in ("sft", "iter_000"))
    stored = {"since": "sft", "answer_accuracy": {"value": 0.1, "standard_error": 0.01}}
    now = {"iterate": "iter_001", "answer_accuracy": 0.35, "changes": stored} | errors
    assert Change.of("answer_accuracy", start, now).half == pytest.approx(CONFIDENCE * 0.01)
    assert Change.of("answer_accuracy", other, now).half == pytest.approx(CONFIDENCE * 0.03 * 2**0.5)
    assert Change.of("answer_accuracy", start, {"iterate": "iter_001", "answer_accuracy": 0.35}).half is None
