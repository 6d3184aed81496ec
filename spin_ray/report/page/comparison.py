"""Comparison of two runs, in a sentence."""

from spin_ray.report.measures import BY_KEY
from spin_ray.report.page.verdict import judged
from spin_ray.report.page.view import RunView
from spin_ray.report.uncertainty import Change, changes_by_row, common_means


def compare(first: RunView, other: RunView, first_name: str, other_name: str) -> str:
    """Compares the newest iterates of two runs in a sentence."""
    if not first.evaluations or not other.evaluations:
        return f"{first_name} and {other_name} cannot be compared yet: not both have been evaluated."
    if first.description["inputs"]["heldout"] != other.description["inputs"]["heldout"]:
        return f"{first_name} and {other_name} have different held-out rows, so their numbers cannot be compared."
    one, two = first.evaluations[-1], other.evaluations[-1]
    rows = [view.rows.get(view.evaluations[-1]["iterate"]) for view in (first, other)]
    names = f"{two['iterate']} of {other_name} against {one['iterate']} of {first_name}"
    for key, say in (("answer_accuracy", _say_accuracy), ("generated_length", _say_length)):
        if None in (BY_KEY[key].of(one), BY_KEY[key].of(two)):
            continue
        otherwise = _other_conditions(first, other, key)
        if rows[0] is None or rows[1] is None:
            change = Change.of(key, one, two, {})
            return f"{names}: {say((one[key], two[key]), '', change, one['real_length'])}{otherwise}"
        means = common_means(key, rows[0], rows[1])
        if means is None:
            continue
        before, now, count = means
        change = Change.of(key, one, two, changes_by_row(rows[0], rows[1]))
        human = one["real_length"] if count == one["rows"] == two["rows"] else None
        return f"{names}: {say((before, now), f'{count} ', change, human)}{otherwise}"
    return f"{first_name} and {other_name} have no measure or no held-out rows in common, so they cannot be compared."


def _say_accuracy(values: tuple[float, float], rows: str, change: Change, human: float | None) -> str:
    both = " that both answered" if rows else ""
    return (
        f"{values[1]:.1%} of the {rows}held-out questions{both} right against {values[0]:.1%}, "
        f"{judged(change, '.1%')}; another seed may differ by more."
    )


def _say_length(values: tuple[float, float], rows: str, change: Change, human: float | None) -> str:
    to = f" to the {rows}prompts that both answered" if rows else ""
    of_humans = "" if human is None else f" (human: {human:.1f})"
    return (
        f"responses{to} of {values[1]:.1f} tokens against {values[0]:.1f}{of_humans}, {judged(change, '.1f')}; each "
        "run's losses and margins are against its own opponents, so compare only examples, lengths and benchmarks."
    )


_GRADED_BY = ("evaluation.samples", "evaluation.grade", "evaluation.answer_extractor")


def _other_conditions(first: RunView, other: RunView, key: str) -> str:
    """Returns a sentence on settings of sampling and grading that differ, or nothing."""
    one, two = first.settings, other.settings
    names = [name for name in one | two if name.startswith("generation.sampling.")]
    names += _GRADED_BY if key == "answer_accuracy" else ()
    told = [f"{name} {two.get(name)} against {one.get(name)}" for name in names if one.get(name) != two.get(name)]
    return f" Beware: the answers were sampled or graded otherwise ({', '.join(told)})." if told else ""
