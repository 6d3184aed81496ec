"""The measures of an iterate, and their bad values.

The key ``against_opponent.loss`` is ``loss`` in the section ``against_opponent`` of ``eval.json``. The section
``standard_errors`` uses whole keys.
"""

import math
from dataclasses import dataclass
from typing import Any

from spin_ray.report.uncertainty import CONFIDENCE, interval_of_share

Evaluation = dict[str, Any]
"""Content of ``eval.json``."""
GUESSING = math.log(2)
"""Logistic loss of a policy that guesses: of margins 0."""


@dataclass(frozen=True, slots=True)
class Measure:
    key: str
    """Place in ``eval.json``, and name below ``eval/`` in trackers."""
    title: str
    meaning: str
    bad: str
    digits: int = 3

    def of(self, evaluation: Evaluation) -> float | None:
        """Returns the value; None if not measured."""
        value: Any = evaluation
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def is_of_own_opponent(self) -> bool:
        """Tells whether each iterate is measured against another model, the iterate before it."""
        return self.key.startswith(("against_", "jsd_")) or self.key == "real_logp_drift"

    def interval(self, evaluation: Evaluation) -> tuple[float, float] | None:
        """Returns the 95 % interval, of a fraction within 0 and 1; None without a standard error."""
        value, error = self.of(evaluation), evaluation.get("standard_errors", {}).get(self.key)
        if value is None or error is None or not math.isfinite(value + error):
            return None
        if self.key in _DRAWS:
            return interval_of_share(value, error, evaluation[_DRAWS[self.key]])
        low, high = value - CONFIDENCE * error, value + CONFIDENCE * error
        return (max(low, 0.0), min(high, 1.0)) if self.key in _FRACTIONS else (low, high)

    def spread(self, evaluation: Evaluation) -> str:
        """Returns ``± 0.05``, or ``(0.00 to 0.06)`` for a share, whose interval is not around it; empty without one."""
        value, interval = self.of(evaluation), self.interval(evaluation)
        if value is None or interval is None:
            return ""
        below, above = value - interval[0], interval[1] - value
        if self.key in _FRACTIONS and not math.isclose(below, above, abs_tol=1e-9):
            return f"({interval[0]:.{self.digits}f} to {interval[1]:.{self.digits}f})"
        return f"± {below:,.{self.digits}f}"


MEASURES = (
    Measure(
        "answer_accuracy", "answer accuracy",
        "pass@1: fraction of right answers among the rows that have one, sampled at the recipe's temperature "
        "`evaluation.samples` times a row",
        "Falling: the model gets worse at the task, however good the losses look.",
    ),
    Measure(
        "against_opponent.loss", "held-out loss",
        "logistic loss on held-out rows, with y′ of the opponent, which is the iterate before",
        "At or above ln 2 = 0.693: nothing carries over, or this model cannot tell the opponent from the humans. Near "
        "0: different, not yet better; a rise from one iterate to the next can mean a closer opponent.", 4,
    ),
    Measure(
        "against_opponent.objective", "held-out objective",
        "the trained loss on the same rows, where it is not the logistic one and takes log-ratios alone",
        "At or above its value at step 0: it learned nothing that carries over.", 4,
    ),
    Measure(
        "against_opponent.margin", "margin",
        "mean margin on the same rows, in nats times beta",
        "Many nats after few steps: the policy is running away from its opponent.",
    ),
    Measure(
        "against_opponent.accuracy", "margin accuracy",
        "fraction of these margins that are above 0 (y = y′ counts as wrong)",
        "1.00 at once: something trivial tells y from y′; compare the lengths.", 2,
    ),
    Measure(
        "against_self.loss", "loss on own samples",
        "the same loss with fresh y′ of the iterate itself",
        "No sign by itself: margins that spread around 0 lift it above ln 2, also where the model is the data.", 4,
    ),
    Measure(
        "against_self.margin", "margin on own samples", "the same margin with fresh y′ of the iterate itself",
        "Below 0 by more than chance: it overshot; its own samples gained more over the opponent than the human "
        "responses did.",
    ),
    Measure(
        "jsd_lower_bound", "distance of the opponent",
        "(ln 2 − held-out loss) / 2, in nats: a lower bound, up to sampling error, of the Jensen-Shannon divergence "
        "between human responses and the opponent's",
        "Near 0, as the loss is near ln 2: this model sees nothing left to learn. A fall can mean a closer opponent, "
        "or a model that learned less.", 4,
    ),
    Measure(
        "real_logp_drift", "drift of log p(y)",
        "log p of the human responses under the iterate minus that under the opponent, mean in nats per response",
        "Falling: probability leaves the data; lower the learning rate, raise beta, or set objective.sft_weight.",
    ),
    Measure(
        "against_opponent.generated_logp_drift", "drift of log p(y′)",
        "the same for the opponent's responses",
        "Falling by many nats together with the drift of log p(y): probability goes to other responses.",
    ),
    Measure(
        "against_self.generated_logp_drift", "KL to the opponent",
        "log p of the iterate's own samples under the iterate minus that under the opponent, mean in nats per response",
        "Many nats in one iteration: the step was too large. Clearly below 0, which no KL is: the samples are not from "
        "this model; an engine in bfloat16 may round small updates away.",
    ),
    Measure(
        "kl_to_base", "KL to the base",
        "log p of the iterate's own samples under the iterate minus that under sft (θ_0), mean in nats per response",
        "Growing by many nats with each iteration: it drifts away from the model that was aligned and tested; a larger "
        "beta, fewer iterations or objective.reference_alpha hold it back.",
    ),
    Measure(
        "against_opponent.margin_concentration", "margin concentration",
        "part of a pair's changes of log p (absolute) that lies in the tenth of its tokens with the largest changes; "
        "mean over pairs; even changes have little above 0.1, independent ones about 0.3",
        "Near 1: a few tokens (an opening, the end of the turn) make the margin, and the rest hardly counts.",
        2,
    ),
    Measure("real_length", "length of y", "mean tokens of the human responses", "No measure of the model.", 1),
    Measure(
        "generated_length", "length of y′", "mean tokens of the iterate's responses",
        "Moving away from the length of y from one iterate to the next.", 1,
    ),
    Measure(
        "length_auc", "length AUC",
        "chance that a human response is longer than a generated one (ties count half)",
        "Far from 0.5: length alone tells them apart, and may be all that the model learns.", 2,
    ),
    Measure(
        "truncation_rate", "cut at max_tokens", "fraction of y′ that reach the limit before they end",
        "Rising: more answers reach the limit before they end.", 2,
    ),
    Measure(
        "identical_share", "y = y′", "fraction of y′ equal to y",
        "Near 1: nothing is left to learn, and more SPIN does harm.", 2,
    ),
    Measure(
        "duplicate_share", "duplicates", "fraction of y′ that repeat an earlier one, of another prompt",
        "Far above the duplicates among y: it gives the same answer to everything.", 2,
    ),
    Measure(
        "real_duplicate_share", "duplicates among y", "the same fraction among the human responses",
        "No measure of the model: compare the duplicates with it.", 2,
    ),
    Measure(
        "distinct_2", "distinct-2", "different pairs of neighbouring tokens over all such pairs in the y′",
        "Falling, or far below distinct-2 of y: the wording gets poorer.", 2,
    ),
    Measure(
        "real_distinct_2", "distinct-2 of y", "the same for the human responses",
        "No measure of the model: compare distinct-2 with it, which falls with length.", 2,
    ),
)  # fmt: skip
_FRACTIONS = {
    "answer_accuracy", "against_opponent.accuracy", "against_opponent.margin_concentration", "length_auc",
    "truncation_rate", "identical_share", "duplicate_share", "real_duplicate_share", "distinct_2", "real_distinct_2",
}  # fmt: skip
_DRAWS = dict.fromkeys(("against_opponent.accuracy", "truncation_rate", "identical_share"), "conversations") | {
    "answer_accuracy": "conversations_graded"
}
"""Keys of shares, and of the number of independent draws."""
BY_KEY = {measure.key: measure for measure in MEASURES}


def stop_evidence(evaluations: list[Evaluation], patience: int, min_fall: float) -> dict[str, Any] | None:
    """Returns the reason to stop after the last of ``evaluations`` (of θ_0, θ_1, …); None: go on.

    θ_t's evaluation bounds the distance of its opponent θ_{t-1} from human responses.
    """
    bound = BY_KEY["jsd_lower_bound"]
    found = [(it["opponent"], value) for it in evaluations if (value := bound.of(it)) is not None]
    earlier, recent = found[:-patience], found[-patience:]
    if not earlier or min(value for _, value in recent) < min(value for _, value in earlier) - min_fall:
        return None
    closest = min(found, key=lambda it: it[1])[0]
    return {
        "reason": f"the held-out distance has not fallen for {patience} iteration(s); {closest} was closest to human "
        "responses",
        "closest": closest,
        "distances": dict(found),
        "patience": patience,
        "min_fall": min_fall,
    }


def as_markdown() -> str:
    """Returns the documentation's table."""
    lines = ["| measure | in eval.json | meaning | look out for |", "|---|---|---|---|"]
    lines += [f"| {it.title} | `{it.key}` | {it.meaning} | {it.bad} |" for it in MEASURES]
    return "\n".join(lines) + "\n"
