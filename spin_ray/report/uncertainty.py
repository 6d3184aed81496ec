"""Standard errors of means over held-out rows, and of changes of such means.

Rows of one conversation depend on each other, and two models that answer the same rows are compared row by row.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.run_dir.names import prompt_of

CONFIDENCE = 1.96
"""Standard errors on each side of a 95 % interval."""
LEAST_FREEDOM = 0.7
"""Degrees of freedom below which no interval is told; its half would be over 30 standard errors."""
SHARE = (0.0, 0.0, 1.0, 1.0)
"""Rows added for the interval of a share: 0 of n is not certainly 0 (Agresti and Coull 1998, "plus four")."""
CHANGE_OF_SHARE = (-1.0, 1.0)
"""Differences added for the error of a change of a share (Bonett and Price 2012)."""


def conversation_groups(rows: pa.Table) -> dict[str, int]:
    """Returns the number of each prompt_id's conversation.

    Turns of one conversation share a number, and so do responses to one prompt and rows of one ``conversation_id``.

    Args:
        rows: PROMPT_SCHEMA rows. The messages of a later turn begin with those of an earlier one.
    """
    conversations = [json.loads(each) for each in rows["messages"].to_pylist()]
    known = {_key(messages) for messages in conversations}
    joined: dict[tuple[str, str], tuple[str, str]] = {}

    def root(name: tuple[str, str]) -> tuple[str, str]:
        while (further := joined.setdefault(name, name)) != name:
            name = joined[name] = joined.setdefault(further, further)  # halves the way for the next
        return name

    first_prompts = []
    for messages, named in zip(conversations, rows["conversation_id"].to_pylist(), strict=True):
        starts = (messages[:end] for end in range(1, len(messages)))
        first = next((start for start in starts if _key(start) in known), messages)
        first_prompts.append(("messages", _key(first[:-1])))
        if named is not None:
            joined[root(first_prompts[-1])] = root(("conversation_id", named))  # a name joins many prompts
    numbers: dict[tuple[str, str], int] = {}
    return {
        prompt_id: numbers.setdefault(root(prompt), len(numbers))
        for prompt_id, prompt in zip(rows["prompt_id"].to_pylist(), first_prompts, strict=True)
    }


def _key(messages: list[Any]) -> str:
    return json.dumps(messages)


def standard_error(
    values: np.ndarray, groups: Sequence[int] | None = None, added: Collection[float] = ()
) -> float | None:
    """Returns the mean's standard error; None where one group has all rows, or nearly all.

    Few groups widen it: of a share by the rows added, else so that CONFIDENCE errors are the interval of Student's t
    with one degree of freedom less than groups. Groups of unequal size count as fewer, by the squares of their shares
    of the rows, and a large one's deviation as larger, because it pulls the mean (CR2 of Bell and McCaffrey 2002).

    Args:
        values: float [rows].
        groups: number of each row's conversation; its rows count as one draw (cluster-robust error of Liang and Zeger
            1986). None: rows are independent.
        added: further independent rows, ``SHARE`` or ``CHANGE_OF_SHARE``, each with the weight of a mean group.
    """
    from scipy.special import stdtrit  # slow import, which scoring workers do not need

    numbers = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(numbers)
    if len(sizes) < 2:
        return None
    more, weight = np.asarray(list(added)), len(values) / len(sizes)
    total = len(values) + weight * len(more)
    mean = (values.astype(np.float64).sum() + weight * more.sum()) / total
    sums = np.concatenate([np.bincount(numbers, values - mean), weight * (more - mean)])
    shares = np.concatenate([sizes, np.full(len(more), weight)]) / total
    freedom = 1 / np.square(shares).sum() - 1
    if freedom < LEAST_FREEDOM:
        return None
    error = math.sqrt((np.square(sums) / (1 - shares)).sum()) / total
    usual = stdtrit(len(sums) - 1, 0.975) if len(more) else CONFIDENCE
    return error * float(stdtrit(freedom, 0.975) / usual)


def interval_of_share(share: float, error: float, draws: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, around the mean with the rows of SHARE.

    Args:
        error: result of ``standard_error`` with SHARE.
        draws: number of independent rows or conversations.
    """
    centre, half = (share * draws + sum(SHARE)) / (draws + len(SHARE)), CONFIDENCE * error
    return max(centre - half, 0.0), min(centre + half, 1.0)


def standard_errors(by_row: Mapping[str, Any], groups: Mapping[str, int]) -> dict[str, float]:
    """Returns the errors of the means of several measures, where they can be told.

    Args:
        by_row: series [rows] by the measure's key, indexed by prompt_id or pair_id. Booleans are shares.
        groups: result of ``conversation_groups``.
    """
    found = {}
    for key, values in by_row.items():
        numbers = [groups[prompt_of(row)] for row in values.index]
        error = standard_error(np.asarray(values), numbers, SHARE if values.dtype == bool else ())
        if error is not None:
            found[key] = error
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a measure from one evaluation to another."""

    value: float
    half: float | None
    """Half its 95 % interval; None if unknown."""

    @classmethod
    def of(cls, key: str, before: dict[str, Any], now: dict[str, Any], paired: dict[str, Any] | None = None) -> Self:
        """Compares two evaluations that have the measure ``key`` at their top, by the rows that both have.

        Args:
            paired: result of ``changes_by_row``; empty: both are as if of different rows. None: what ``now`` stored.
        """
        value = now[key] - before[key]
        stored = now.get("changes", {})
        found = paired if paired is not None else stored if stored.get("since") == before.get("iterate") else {}
        if key in found:
            error = found[key]["standard_error"]
            return cls(found[key].get("value", value), None if error is None else CONFIDENCE * error)
        errors = [it.get("standard_errors", {}).get(key) for it in (before, now)]
        return cls(value, None if None in errors else CONFIDENCE * math.hypot(*errors))


PAIRED = {"answer_accuracy": CHANGE_OF_SHARE, "truncation_rate": CHANGE_OF_SHARE, "generated_length": ()}
"""Measures by row whose changes are compared, and what is added for their errors."""
ROW_SCHEMA = pa.schema(
    [pa.field("prompt_id", pa.string()), pa.field("conversation", pa.int32())]
    + [pa.field(name, pa.float64()) for name in PAIRED]
)
"""An iterate's measures of each held-out row; null if a row's answer cannot be graded."""


def changes_by_row(before: pa.Table, now: pa.Table) -> dict[str, Any]:
    """Returns mean differences of ROW_SCHEMA rows with the same prompt_id, and their standard errors."""
    before, now = common_rows(before, now)
    groups = now["conversation"].to_numpy()
    found = {}
    for name, added in PAIRED.items():
        differences = pc.subtract(now[name], before[name]).to_numpy()  # nulls become NaN
        there = ~np.isnan(differences)
        if there.any():
            error = standard_error(differences[there], groups[there], added)
            if error is not None:  # the interval is around the mean with those added; this one, around 0 as often
                draws = len(np.unique(groups[there]))
                error *= (draws + len(added)) / draws
            found[name] = {"value": float(differences[there].mean()), "standard_error": error}
    return found


def change_of(key: str, before: dict[str, Any], now: dict[str, Any], rows: Mapping[str, pa.Table]) -> Change:
    """Returns the change between two evaluations of a run, on the same rows where both iterates' rows are there.

    Args:
        rows: ROW_SCHEMA rows by iterate.
    """
    return Change.of(key, before, now, changes_between(before, now, rows))


def changes_between(before: dict[str, Any], now: dict[str, Any], rows: Mapping[str, pa.Table]) -> dict[str, Any] | None:
    """Returns ``changes_by_row`` of two evaluations of a run; None if an iterate's rows are not there."""
    tables = [rows[it["iterate"]] for it in (before, now) if it["iterate"] in rows]
    return changes_by_row(tables[0], tables[1]) if len(tables) == 2 else None


def common_rows(before: pa.Table, now: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Returns the rows of both whose prompt_id the other has, in one order."""
    now = now.filter(pc.is_in(now["prompt_id"], value_set=before["prompt_id"]))
    return before.take(pc.index_in(now["prompt_id"], value_set=before["prompt_id"])), now


def common_means(key: str, before: pa.Table, now: pa.Table) -> tuple[float, float, int] | None:
    """Returns both means of a measure over the rows for which both have it, and their number; None without any."""
    before, now = common_rows(before, now)
    values = np.stack([table[key].to_numpy() for table in (before, now)])
    values = values[:, ~np.isnan(values).any(axis=0)]
    return (float(values[0].mean()), float(values[1].mean()), values.shape[1]) if values.size else None
