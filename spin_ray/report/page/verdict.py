"""Verdict on the newest iterate, in sentences."""

import pyarrow as pa

from spin_ray.report.history import first_evaluation
from spin_ray.report.measures import BY_KEY, GUESSING, Evaluation
from spin_ray.report.uncertainty import Change, change_of
from spin_ray.run_dir.names import iterate_name


def worth(evaluations: list[Evaluation], rows: dict[str, pa.Table]) -> str:
    """Compares the newest iterate with θ_0 by accuracy, or tells its held-out loss where nothing is graded."""
    first, last = first_evaluation(evaluations), evaluations[-1]
    name, accuracy = last["iterate"], BY_KEY["answer_accuracy"]
    now, before = accuracy.of(last), accuracy.of(first or {})
    if now is not None and before is not None and first is not None and first is not last:
        changed = judged(change_of("answer_accuracy", first, last, rows), ".1%")
        return (
            f"{name} answers {now:.1%} of {last['answers_graded']} held-out questions right, {first['iterate']} "
            f"{before:.1%}: a change of {changed}."
        )
    loss = BY_KEY["against_opponent.loss"]
    if (value := loss.of(last)) is None:
        return f"{name} has been sampled; no later iterate has been compared with it yet."
    interval = loss.interval(last)
    shown = f"{value:.3f}" + (f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else "")
    if (interval[1] if interval else value) < GUESSING:
        return (
            f"{name} tells held-out human responses from those of {last['opponent']} (loss {shown}; guessing gives "
            f"{GUESSING:.3f}), so what it learned carries over to new prompts; different is not yet better."
        )
    return (
        f"{name} cannot be shown to tell held-out human responses from those of {last['opponent']} "
        f"(loss {shown}; guessing gives {GUESSING:.3f})."
    )


def rank(evaluations: list[Evaluation], rows: dict[str, pa.Table]) -> str:
    """Compares the newest iterate with the one before it, and names an earlier one that answers better.

    Returns nothing for θ_0 and θ_1 alone, which ``worth`` compares.
    """
    *earlier, last = evaluations
    if len(earlier) < 2:
        return ""
    accuracy = BY_KEY["answer_accuracy"]
    graded = [it for it in earlier if None not in (accuracy.of(it), accuracy.of(last))]

    def change(key: str, before: Evaluation, digits: str, unit: str = "") -> str:
        return f"{before[key]:{digits}}{unit}, a change of {judged(change_of(key, before, last, rows), digits)}"

    before = earlier[-1]
    if before in graded:
        said = f" {before['iterate']}, the iterate before, answered {change('answer_accuracy', before, '.1%')}."
    else:
        numbers = change("generated_length", before, ".1f", " tokens")
        said = f" Responses of {before['iterate']}, the iterate before, have {numbers}."
    better = [it for it in graded if _is_fall(change_of("answer_accuracy", it, last, rows))]
    if not better:
        return said
    best = max(better, key=lambda it: it["answer_accuracy"])
    known = best is before or best is first_evaluation(evaluations)
    numbers = "" if known else f" ({change('answer_accuracy', best, '.1%')})"
    return f"{said} The best is {best['iterate']}{numbers}: use {best['iterate']}, not {last['iterate']}."


def _is_fall(change: Change) -> bool:
    return change.half is not None and change.value < -change.half


def caution(evaluations: list[Evaluation], found: list[tuple[str, str]]) -> str:
    """Points to the newest iterate's warnings, or says what its responses look like."""
    first, last = first_evaluation(evaluations), evaluations[-1]
    if mine := [text for iterate, text in found if iterate == last["iterate"]]:
        which = "warning" if len(mine) == 1 else f"{len(mine)} warnings"
        return f"Beware: see the {which} on {last['iterate']} below."
    rest = f"{last['truncation_rate']:.0%} of them are cut, {last['identical_share']:.0%} equal y."
    now, human = f"{last['generated_length']:.1f} tokens", f"(human: {last['real_length']:.1f})"
    if first is last:
        return f"Its responses have {now} {human}, {rest}"
    if first is None:
        return (
            f"Whether {last['iterate']} collapses cannot be told, as {iterate_name(0)} has no evaluation to compare it "
            f"with: its responses have {now} {human}, {rest}"
        )
    return f"No sign of collapse: responses went from {first['generated_length']:.1f} to {now} {human}, {rest}"


def judged(change: Change, digits: str) -> str:
    half = "unknown" if change.half is None else format(change.half, digits)
    beyond = change.half is not None and abs(change.value) > change.half
    judged = "more than chance" if beyond else "no more than chance may give"
    return f"{change.value:+{digits}} (± {half}), {judged}"
