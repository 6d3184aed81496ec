"""Warnings of collapse or of misleading measures: a rule each, with its threshold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from spin_ray.report.measures import BY_KEY, GUESSING, Evaluation
from spin_ray.report.uncertainty import Change, changes_between


@dataclass(frozen=True, slots=True)
class Compared:
    """An iterate's evaluation beside that of an earlier one."""

    evaluation: Evaluation
    earlier: Evaluation | None
    paired: dict[str, Any] | None
    """Changes on the same held-out rows; None: unknown."""
    limit: int
    """The recipe's ``max_tokens``."""

    def now(self, key: str) -> float | None:
        return BY_KEY[key].of(self.evaluation)

    def before(self, key: str) -> float | None:
        return BY_KEY[key].of(self.earlier) if self.earlier else None

    def change(self, key: str) -> Change | None:
        """Returns the change since the earlier iterate; None within chance."""
        if self.now(key) is None or self.before(key) is None:
            return None
        found = Change.of(key, self.earlier or {}, self.evaluation, self.paired)
        return None if abs(found.value) <= (found.half or 0.0) else found

    @property
    def since(self) -> str:
        return self.earlier["iterate"] if self.earlier else ""


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    number: str
    """Definition of the compared number."""
    threshold: float
    """Smallest number that warns."""
    measure: Callable[[Compared], float | None]
    """Function that returns the number, or None if unknown."""
    sentence: Callable[[Compared], str]

    def severity(self, compared: Compared) -> float:
        """Returns the number over its threshold. From 1 on the rule warns."""
        number = self.measure(compared)
        return 0.0 if number is None else number / self.threshold


def _fall_of_both(it: Compared) -> float | None:
    real, generated = it.now("real_logp_drift"), it.now("against_opponent.generated_logp_drift")
    return None if real is None or generated is None else min(-real, -generated)


def _below_zero(it: Compared, key: str) -> float | None:
    value, interval = it.now(key), BY_KEY[key].interval(it.evaluation)
    if value is None or interval is None or interval[1] >= 0:
        return None
    half = (interval[1] - interval[0]) / 2
    return -value / half if half else math.inf


def _more_cut(it: Compared) -> float | None:
    change = it.change("truncation_rate")
    return change.value if change else None


def _away_from_y(it: Compared) -> float | None:
    real, now, before = it.now("real_length"), it.now("generated_length"), it.before("generated_length")
    if not real or not now or not before or it.change("generated_length") is None:
        return None
    return max(now / before, before / now) if abs(now - real) > abs(before - real) else None


def _more_duplicates(it: Compared) -> float | None:
    now, usual = it.now("duplicate_share"), it.now("real_duplicate_share")
    return None if now is None or usual is None else now - usual


def _poorer(it: Compared) -> float | None:
    now, before = it.now("distinct_2"), it.before("distinct_2")
    return None if now is None or not before else 1 - now / before


def _by_length_alone(it: Compared) -> float | None:
    auc, accuracy = it.now("length_auc"), it.now("against_opponent.accuracy")
    return None if auc is None or accuracy is None or accuracy <= 0.95 else abs(auc - 0.5)


def _fewer_right(it: Compared) -> float | None:
    change = it.change("answer_accuracy")
    return -change.value / change.half if change and change.half else None


RULES = (
    Rule(
        "answers", "fall of answer_accuracy since an earlier iterate, over half the 95 % interval of the change", 1.0,
        _fewer_right,
        lambda it: f"{it.now('answer_accuracy'):.1%} of the answers are right ({it.before('answer_accuracy'):.1%} at "
        f"{it.since}), more of a fall than chance gives: the model gets worse at the task.",
    ),
    Rule(
        "held-out loss", "against_opponent.loss", GUESSING, lambda it: it.now("against_opponent.loss"),
        lambda it: f"held-out loss {it.now('against_opponent.loss'):.3f} is not below ln 2: what was learned does not "
        "carry over to new rows.",
    ),
    Rule(
        "overshoot", "depth of against_self.margin below 0, over half its 95 % interval", 1.0,
        lambda it: _below_zero(it, "against_self.margin"),
        lambda it: f"margin on own samples {it.now('against_self.margin'):.3f} is below 0 by more than chance: the "
        "iterate overshot, its samples gained more than y did.",
    ),
    Rule(
        "lost probability", "smaller fall of log p(y) and log p(y′), in nats", 2.0, _fall_of_both,
        lambda it: f"log p(y) fell by {-(it.now('real_logp_drift') or 0):.1f} and log p(y′) by "
        f"{-(it.now('against_opponent.generated_logp_drift') or 0):.1f} nats: probability goes to other responses.",
    ),
    Rule(
        "KL below 0", "depth of against_self.generated_logp_drift below 0, over half its 95 % interval", 1.0,
        lambda it: _below_zero(it, "against_self.generated_logp_drift"), lambda it: _kl_sentence(it),
    ),
    Rule(
        "equal to y", "identical_share", 0.5, lambda it: it.now("identical_share"),
        lambda it: f"{it.now('identical_share'):.0%} of y′ equal y: little is left to learn, and more SPIN does harm.",
    ),
    Rule(
        "cut", "rise of truncation_rate since an earlier iterate, if beyond chance", 0.05, _more_cut,
        lambda it: f"{it.now('truncation_rate'):.0%} of y′ are cut at max_tokens ({it.before('truncation_rate'):.0%} "
        f"at {it.since}): more answers reach the limit of {it.limit} tokens, or that of "
        "model.max_length.",
    ),
    Rule(
        "length",
        "factor between the lengths of y′ now and at an earlier iterate, if beyond chance and away from the length of "
        "y",
        1.25, _away_from_y,
        lambda it: f"y′ went from {it.before('generated_length'):.1f} tokens at {it.since} to "
        f"{it.now('generated_length'):.1f}, away from the {it.now('real_length'):.1f} of y.",
    ),
    Rule(
        "duplicates", "duplicate_share − real_duplicate_share", 0.15, _more_duplicates,
        lambda it: f"{it.now('duplicate_share'):.0%} of y′ repeat an earlier one (of y: "
        f"{it.now('real_duplicate_share'):.0%}): the answers collapse onto a few.",
    ),
    Rule(
        "wording", "fall of distinct_2 since an earlier iterate, as a fraction", 0.4, _poorer,
        lambda it: f"distinct-2 fell to {it.now('distinct_2'):.2f} from {it.before('distinct_2'):.2f} at {it.since}: "
        "the wording gets poorer.",
    ),
    Rule(
        "length alone", "distance of length_auc from 0.5, if against_opponent.accuracy is above 0.95", 0.4,
        _by_length_alone,
        lambda it: f"length alone tells y from y′ (AUC {it.now('length_auc'):.2f}): the model may have learned little "
        "else.",
    ),
)  # fmt: skip


def _kl_sentence(it: Compared) -> str:
    low, high = BY_KEY["against_self.generated_logp_drift"].interval(it.evaluation) or (0.0, 0.0)
    return (
        f"KL to the opponent is estimated below 0 ({low:.1f} to {high:.1f}): the samples are not from this model; the "
        "engine's dtype may round small updates away (generation.engine.dtype), or generation.sampling changes the "
        "distribution."
    )


def all_warnings(evaluations: list[Evaluation], rows: Mapping[str, pa.Table], limit: int) -> list[tuple[str, str]]:
    """Returns each iterate's name with a warning."""
    return [
        (evaluation["iterate"], text)
        for place, evaluation in enumerate(evaluations)
        for text in warnings(evaluation, evaluations[:place], rows, limit)
    ]


def warnings(
    evaluation: Evaluation, earlier: Sequence[Evaluation], rows: Mapping[str, pa.Table], limit: int
) -> list[str]:
    """Returns the sentences of the rules that apply, the worst first.

    Args:
        earlier: evaluations of earlier iterates. A rule names the one against which its number is the worst.
        rows: measures by held-out row, by iterate, for changes on the same rows.
        limit: the recipe's ``max_tokens``.
    """
    pairs = [
        Compared(evaluation, each, changes_between(each, evaluation, rows) if each else None, limit)
        for each in earlier or [None]
    ]
    found = []
    for rule in RULES:
        severities = [rule.severity(compared) for compared in pairs]
        worst = max(severities)
        found.append((worst, rule.sentence, pairs[severities.index(worst)]))
    found.sort(key=lambda each: -each[0])
    return [sentence(compared) for severity, sentence, compared in found if severity >= 1]


def as_markdown() -> str:
    """Returns the documentation's table."""
    lines = ["| warning | number | from |", "|---|---|---|"]
    lines += [f"| {rule.name} | {rule.number} | {rule.threshold:.3g} |" for rule in RULES]
    return "\n".join(lines) + "\n"
