"""The verdict of a probe: is anything left to learn from θ_0's responses, and by which objective?

Samples are of all rows, before any training. Margins and log p are of rows that the two short trainings did not see.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ProbeConfig
from spin_ray.report.margins import jsd_error, jsd_lower_bound
from spin_ray.report.measures import BY_KEY
from spin_ray.report.uncertainty import CONFIDENCE, interval_of_share, standard_errors
from spin_ray.run_dir.names import prompt_of
from spin_ray.run_dir.run_dir import RunDir

PROBE = "probe.json"
SPIN, ANOTHER, SFT, STOP = "spin", "another objective", "more sft", "stop"
Evidence = dict[str, Any]
"""Numbers by key. ``standard_errors`` are of the means; ``ngrams`` has its own interval."""


def margin_evidence(margins: pd.Series, real_drift: pd.Series, groups: Mapping[str, int]) -> Evidence:
    """Returns the evidence of a short SPIN iteration, from held-out margins and changes of log p(y).

    Args:
        margins: by pair_id, as in ``row_margins``.
        groups: result of ``conversation_groups``.
    """
    numbers = [groups[prompt_of(row)] for row in margins.index]
    by_row = {
        "loss": pd.Series(calibrated_losses(margins.to_numpy(), numbers), margins.index),
        "margin": margins,
        "accuracy": margins > 0,
        "real_logp_drift": real_drift,
    }
    found: Evidence = {name: float(values.mean()) for name, values in by_row.items()}
    errors = standard_errors(by_row, groups)
    found["jsd_lower_bound"] = jsd_lower_bound(found["loss"])
    errors |= jsd_error(errors, "loss")
    return found | {"standard_errors": errors, "draws": len(set(numbers))}


def calibrated_losses(margins: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Returns the logistic loss of each margin, at the best scale for the other half of the rows.

    A short training finds the margin's direction but not its size. A scale of 0 gives ln 2.

    Args:
        groups: number of each row's conversation, whose rows are in one half.
    """
    size = float(np.abs(margins).mean()) if len(margins) else 0.0
    if size == 0:
        return np.full(len(margins), math.log(2))
    scaled, losses = margins / size, np.empty(len(margins))
    halves = pd.factorize(np.asarray(groups))[0] % 2
    for half in (halves == 0, halves == 1):
        losses[half] = np.logaddexp(0.0, -_best_scale(scaled[~half]) * scaled[half])
    return losses


def _best_scale(margins: np.ndarray) -> float:
    """Returns the scale of least logistic loss. Added margins of 1 and −1 keep it finite."""
    from scipy.optimize import minimize_scalar  # a slow import, which a finished run does not need

    known = np.concatenate([margins, [1.0, -1.0]])
    found = minimize_scalar(
        lambda scale: np.logaddexp(0.0, -scale * known).mean(), bounds=(0.0, 20.0), method="bounded"
    )
    return float(found.x)


def _over_chance(evidence: Evidence, key: str, sign: int = 1) -> float:
    """Returns a mean over half its 95 % interval. Above 1 the interval excludes 0. One row alone gives 0."""
    value, error = evidence.get(key), evidence["standard_errors"].get(key)
    if value is None or error is None or value * sign <= 0:
        return 0.0
    return sign * value / (CONFIDENCE * error) if error else math.inf


def _ngrams_over_chance(evidence: Evidence) -> float:
    found = evidence["ngrams"]
    if found is None or found["accuracy"] <= 0.5:
        return 0.0
    half = found["accuracy"] - found["low"]
    return (found["accuracy"] - 0.5) / half if half else math.inf


def _learned_by_losing(evidence: Evidence) -> float:
    return min(_over_chance(evidence, "jsd_lower_bound"), _over_chance(evidence, "real_logp_drift", -1))


def _sft_helps(evidence: Evidence) -> float:
    return _over_chance(evidence, "sft_gain")


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    number: str
    """Definition of the compared number."""
    threshold: float
    """Smallest number to which the rule applies."""
    verdict: str
    """Verdict, empty for a caution."""
    measure: Callable[[Evidence], float]
    because: Callable[[Evidence], str]
    advice: str = ""

    def applies(self, evidence: Evidence) -> bool:
        return self.measure(evidence) >= self.threshold


RULES = (
    Rule(
        "saturated", "identical_share", 0.5, STOP, lambda it: it["identical_share"],
        lambda it: f"{it['identical_share']:.0%} of y′ equal y",
        "More SPIN does harm where nearly every y′ equals y: keep θ_0, or bring other prompts.",
    ),
    Rule(
        "falling log p(y)", "smaller of jsd_lower_bound and fall of log p(y), each over half its 95 % interval", 1.0,
        ANOTHER, _learned_by_losing,
        lambda it: f"{_seen(it)}, but log p(y) falls by {-it['real_logp_drift']:.2g} nats with it",
        "Hold log p(y): objective.sft_weight, an objective with absolute rewards, a larger beta or a lower rate.",
    ),
    Rule(
        "learns", "jsd_lower_bound over half its 95 % interval", 1.0, SPIN,
        lambda it: _over_chance(it, "jsd_lower_bound"), lambda it: _seen(it),
        "Run it, in short iterations with fresh y′ (data.prompts_per_iteration).",
    ),
    Rule(
        "seen from outside", "accuracy of n-grams above 0.5, over its distance to the interval's lower end", 1.0,
        ANOTHER, _ngrams_over_chance,
        lambda it: f"SPIN's margin does not tell y from y′ ({_bound(it)}), but character n-grams do "
        f"({_accuracy(it)})",
        "The difference is there, but a short iteration does not find it: try another objective, a higher learning "
        "rate or more prompts.",
    ),
    Rule(
        "SFT still helps", "gain of held-out log p(y) by SFT over half its 95 % interval", 1.0, SFT,
        _sft_helps,
        lambda it: f"nothing tells y from y′ ({_bound(it)}; {_accuracy(it)}), but SFT still raises held-out log p(y) "
        f"by {it['sft_gain']:.2g} nats",
        "Train θ_0 further on the human responses, then probe again.",
    ),
    Rule(
        "nothing found", "–", 0.0, STOP, lambda it: 0.0,
        lambda it: f"nothing tells y from y′ ({_bound(it)}; {_accuracy(it)})",
        "Self-play has nothing to learn from these prompts: keep θ_0, or bring other data.",
    ),
    Rule(
        "SFT helps too", "gain of held-out log p(y) by SFT over half its 95 % interval, where the verdict is not SFT",
        1.0, "", _sft_helps,
        lambda it: f"SFT on the same rows still raises held-out log p(y) by {it['sft_gain']:.2g} nats: compare with it "
        "(algorithm continued_sft).",
    ),
    Rule(
        "cut", "truncation_rate", 0.05, "", lambda it: it["truncation_rate"],
        lambda it: f"{it['truncation_rate']:.0%} of y′ are cut at max_tokens: that alone tells them from y.",
    ),
    Rule(
        "length alone", "distance of length_auc from 0.5", 0.2, "", lambda it: abs(it["length_auc"] - 0.5),
        lambda it: f"length tells much ({it['real_length']:.0f} tokens in y, {it['generated_length']:.0f} in y′): SPIN "
        "may learn little else.",
    ),
    Rule(
        "duplicates", "duplicate_share − real_duplicate_share", 0.15, "",
        lambda it: it["duplicate_share"] - it["real_duplicate_share"],
        lambda it: f"{it['duplicate_share']:.0%} of y′ repeat another (of y: {it['real_duplicate_share']:.0%}).",
    ),
    Rule(
        "no held-out data", "1 if the rows measured on are training data", 1.0, "",
        lambda it: float(it["heldout_is_train"]),
        lambda it: "without data.heldout it is measured on training rows, which θ_0 may know by heart.",
    ),
)  # fmt: skip
"""Verdicts in order of precedence, then cautions."""


def _bound(it: Evidence) -> str:
    if it["jsd_lower_bound"] is None:
        return "too few pairs to train on"
    error = it["standard_errors"].get("jsd_lower_bound")
    half = "unknown" if error is None else f"{CONFIDENCE * error:.3f}"
    return f"JSD at least {it['jsd_lower_bound']:.3f} ± {half} nats"


def _seen(it: Evidence) -> str:
    return f"a short iteration of SPIN tells y from y′ on held-out rows ({_bound(it)}; {_accuracy(it)})"


def _accuracy(it: Evidence) -> str:
    found = it["ngrams"]
    if found is None:
        return "too few rows for n-grams"
    return f"n-grams {found['accuracy']:.2f}, {found['low']:.2f} to {found['high']:.2f}"


def decide(evidence: Evidence) -> dict[str, Any]:
    """Returns the verdict, two sentences and cautions."""
    applying = [rule for rule in RULES if rule.applies(evidence)]
    first = next(rule for rule in applying if rule.verdict)
    cautions = [rule for rule in applying if not rule.verdict and rule.measure is not first.measure]
    return {
        "verdict": first.verdict,
        "something_to_learn": first.verdict in (SPIN, ANOTHER),
        "rule": first.name,
        "sentences": [f"Verdict: {first.verdict}, because {first.because(evidence)}.", first.advice],
        "cautions": [rule.because(evidence) for rule in cautions],
    }


def read_probe(run: RunDir) -> dict[str, Any] | None:
    """Returns probe.json; None if it is missing or damaged."""
    try:
        found = json.loads(run.storage.read(PROBE))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and "verdict" in found else None


def should_stop(config: SpinConfig, found: dict[str, Any] | None) -> bool:
    """Tells whether ``probe.stop`` lets this verdict end the run. A probe with other settings does not count."""
    if not (found and config.probe and config.probe.stop):
        return False
    return found["verdict"] == STOP and found["settings"] == asked_of(config.probe)


def asked_of(settings: ProbeConfig) -> dict[str, Any]:
    """Returns the settings that change a probe's numbers."""
    return settings.model_dump(mode="json", exclude={"stop"})


def print_probe(found: dict[str, Any], console: Console) -> None:
    evidence = found["evidence"]
    table = Table("", "value", "±", title="Samples of θ_0; two short trainings, measured on other rows")
    for key, title in _SHOWN.items():
        if (value := evidence.get(key)) is not None:
            table.add_row(title, f"{value:.3f}", _shown_interval(evidence, key, value))
    if ngrams := evidence["ngrams"]:
        table.add_row(
            "accuracy of n-grams", f"{ngrams['accuracy']:.3f}", f"{ngrams['low']:.3f} to {ngrams['high']:.3f}"
        )
    console.print(table)
    for sentence in [*found["sentences"], *(f"Note: {caution}" for caution in found["cautions"])]:
        console.print(sentence, markup=False, soft_wrap=True)


def _shown_interval(evidence: Evidence, key: str, value: float) -> str:
    error = evidence["standard_errors"].get(key)
    if error is None:
        return ""
    if key == "accuracy" and "draws" in evidence:
        low, high = interval_of_share(value, error, evidence["draws"])
        return f"{low:.3f} to {high:.3f}"
    return f"{CONFIDENCE * error:.3f}"


_SHOWN = {
    "loss": "loss at its best scale", "accuracy": "margin accuracy", "jsd_lower_bound": "JSD, lower bound",
    "real_logp_drift": "change of log p(y) by SPIN", "sft_gain": "change of log p(y) by SFT",
} | {
    key: BY_KEY[key].title
    for key in (
        "real_length", "generated_length", "length_auc", "truncation_rate", "identical_share", "duplicate_share",
        "real_duplicate_share",
    )
}  # fmt: skip


def as_markdown() -> str:
    """Returns the documentation's table."""
    lines = ["| rule | verdict | number | from |", "|---|---|---|---|"]
    lines += [f"| {it.name} | {it.verdict or 'caution'} | {it.number} | {it.threshold:.3g} |" for it in RULES]
    return "\n".join(lines) + "\n"
