"""The HTML page, from views of runs."""

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from spin_ray.errors import writing
from spin_ray.report.conditions import in_words
from spin_ray.report.first_loss import first_loss, spelt
from spin_ray.report.measures import BY_KEY, GUESSING, MEASURES, Measure
from spin_ray.report.page.charts import Bar, Series, gantt, line_chart
from spin_ray.report.page.view import RunView, compare, read_view
from spin_ray.report.uncertainty import CONFIDENCE
from spin_ray.run_dir.events import Span, exact_duration
from spin_ray.run_dir.names import iterate_name, iterate_number
from spin_ray.run_dir.run_dir import RunDir

_STAGES = ("prompts", "heldout", "sampling", "pairs", "training", "evaluation")
"""Order of colours and lanes."""
_TRAIN_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss", ("loss",)),
    ("Margin", ("margin",)),
    ("Fraction of margins above 0", ("accuracy",)),
    ("log p(y), and log p(y′) dashed; nats", ("real_logp", "generated_logp")),
    ("Gradient norm before clipping", ("grad_norm",)),
)
_EVAL_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Answer accuracy", ("answer_accuracy",)),
    ("Loss on held-out rows", ("against_opponent.loss", "against_self.loss")),
    ("Margin", ("against_opponent.margin", "against_self.margin")),
    ("Distance of the opponent from human responses", ("jsd_lower_bound",)),
    ("Divergence from the opponent and from the base", ("against_self.generated_logp_drift", "kl_to_base")),
    ("Drift of log-probabilities", ("real_logp_drift", "against_opponent.generated_logp_drift")),
    ("Tokens per response", ("generated_length", "real_length")),
    ("Fractions of the responses", ("truncation_rate", "identical_share", "duplicate_share")),
    ("Distinct pairs of tokens", ("distinct_2", "real_distinct_2")),
)
_LINE_NAMES = {
    "against_self.margin": "with own samples", "against_opponent.margin": "with the opponent's samples",
    "against_opponent.loss": "with the opponent's samples", "against_self.loss": "with own samples",
}  # fmt: skip
Chart = dict[str, Any]


def write_report(runs: Sequence[RunDir], path: Path) -> Path:
    """Writes one page about one or more runs; returns ``path``.

    Raises:
        UserError: as ``report_page`` does, or ``path`` cannot be written.
    """
    page = report_page(runs)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    return path


def report_page(runs: Sequence[RunDir]) -> str:
    """Returns the page as HTML.

    Raises:
        UserError: a folder is no run, or of an unreadable version.
    """
    first = read_view(runs[0])
    prompts = [example.prompt_id for example in first.examples] or None
    views = [first, *(read_view(run, only_prompts=prompts) for run in runs[1:])]
    names = _distinct_names(views)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spin_ray.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": exact_duration, "number": _number}
    return environment.get_template("report.html").render(
        views=views,
        names=names,
        comparisons=[compare(views[0], view, names[0], name) for view, name in zip(views[1:], names[1:], strict=True)],
        measures=_table(views),
        benchmarks=_benchmarks(views),
        eval_charts=list(_eval_charts(views, names)),
        train_charts=list(_train_charts(views, names)),
        first_level=_first_level(views),
        gantts=[gantt(_bars(view)) for view in views],
        stages=_STAGES,
        examples=_examples(views, names),
        differing=_differing(views),
        version=version("spin-ray"),
    )


def _distinct_names(views: Sequence[RunView]) -> list[str]:
    names = [view.name for view in views]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _table(views: Sequence[RunView]) -> list[tuple[Measure, list[tuple[str, str]]]]:
    """Returns rows (measure, [(value, half its interval) per iterate]) with any value."""
    evaluations = [evaluation for view in views for evaluation in view.evaluations]
    rows = []
    for measure in MEASURES:
        cells = []
        for evaluation in evaluations:
            value, interval = measure.of(evaluation), measure.interval(evaluation)
            half = _number((interval[1] - interval[0]) / 2, measure.digits) if interval else ""
            cells.append((_number(value, measure.digits), half))
        if any(measure.of(evaluation) is not None for evaluation in evaluations):
            rows.append((measure, cells))
    return rows


def _benchmarks(views: Sequence[RunView]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Returns the rows of the table; results of other conditions stand in another row."""
    columns = [_by_title(view.benchmarks.get(iterate, {})) for view in views for iterate in view.iterates]
    found = []
    for title, metric in dict.fromkeys(row for column in columns for row in column):
        values = [column.get((title, metric), {}) for column in columns]
        cells = [
            (_number(it.get("value"), 4), _number(CONFIDENCE * error, 4) if (error := it.get("standard_error")) else "")
            for it in values
        ]
        found.append((title, metric, cells))
    return found


def _by_title(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (_benchmark_title(task, result), metric): found
        for task, result in results.items()
        for metric, found in result["metrics"].items()
    }


def _benchmark_title(task: str, result: dict[str, Any]) -> str:
    words = [(result["shots"], "{} examples"), (result["task_version"], "version {}")]
    return ", ".join([in_words(task, result), *(form.format(value) for value, form in words if value is not None)])


def _eval_charts(views: Sequence[RunView], names: Sequence[str]) -> Iterator[Chart]:
    newest = max((iterate_number(name) for view in views for name in view.iterates), default=0)
    x_names = [iterate_name(number) for number in range(newest + 1)]
    compared = len(views) > 1
    for title, keys in _EVAL_CHARTS:
        lines = [
            _line(
                view, BY_KEY[key], name if compared else _LINE_NAMES.get(key, BY_KEY[key].title), run if compared else n
            )
            for run, (view, name) in enumerate(zip(views, names, strict=True))
            for n, key in enumerate(keys[:1] if compared else keys)
        ]
        lines = [line for line in lines if line.points]
        if len({x for line in lines for x, _ in line.points}) > 1:
            level = (GUESSING, "ln 2") if title.startswith("Loss") else (0.0, "") if "Drift" in title else None
            svg = line_chart(title, lines, x_label="iterate", x_names=x_names, baseline=level)
            note = f"{BY_KEY[keys[0]].title}: {BY_KEY[keys[0]].meaning}. {BY_KEY[keys[0]].bad}"
            yield {"title": title, "svg": svg, "legend": lines if len(lines) > 1 else [], "note": note}


def _line(view: RunView, measure: Measure, name: str, colour: int) -> Series:
    evaluations = [(float(iterate_number(it["iterate"])), it) for it in view.evaluations]
    found = [(place, measure.of(it), measure.interval(it)) for place, it in evaluations]
    measured = [(place, value, interval) for place, value, interval in found if value is not None]
    points = [(place, value) for place, value, _ in measured]
    return Series(name, points, colour, [interval for _, _, interval in measured])


def _train_charts(views: Sequence[RunView], names: Sequence[str]) -> Iterator[Chart]:
    logs = [
        (f"{name}: {folder}" if len(views) > 1 else folder, folder, log)
        for view, name in zip(views, names, strict=True)
        for folder, log in view.train_logs.items()
    ]
    warm_up = [Series(label, _points(log, "loss"), n) for n, (label, folder, log) in enumerate(logs) if folder == "sft"]
    yield from _chart("SFT warm-up: loss per token", warm_up)
    logs = [(label, folder, log) for label, folder, log in logs if folder != "sft"]
    for title, keys in _TRAIN_CHARTS:
        lines = [
            Series(label if not n else f"{label}, y′", _points(log, key), colour, dashed=n > 0)
            for colour, (label, _, log) in enumerate(logs)
            for n, key in enumerate(keys)
        ]
        yield from _chart(title, lines, _first_level(views) if keys == ("loss",) else None)


def _first_level(views: Sequence[RunView]) -> tuple[float, str] | None:
    """Returns the loss of step 0 and its text, if all runs share it."""
    levels = {first_loss(view.config) for view in views}
    level = levels.pop() if len(levels) == 1 else None
    return None if level is None else (level, spelt(level))


def _chart(title: str, lines: list[Series], level: tuple[float, str] | None = None) -> Iterator[Chart]:
    if lines:
        svg = line_chart(title, lines, x_label="step", baseline=level)
        legend = [line for line in lines if not line.dashed]
        yield {"title": title, "svg": svg, "legend": legend if len(legend) > 1 else [], "note": ""}


def _points(log: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in log if line.get(key) is not None]


def _bars(view: RunView) -> list[Bar]:
    lanes = {stage: number for number, stage in enumerate(_STAGES)}
    order = sorted(view.spans, key=lambda span: lanes.get(span.stage, len(lanes)))
    return [
        Bar(
            lane=span.stage, start=span.start, end=span.end, colour=lanes.get(span.stage, len(lanes)),
            title=_span_title(span), broken=span.outcome in ("failure", "lost"), useful=span.counted.get("useful"),
        )
        for span in order
    ]  # fmt: skip


def _span_title(span: Span) -> str:
    counted = [f"{span.counted[key]:,} {key}" for key in ("rows", "steps", "tokens") if span.counted.get(key)]
    if span.counted.get("tokens"):
        counted.append(f"{span.counted['tokens'] / max(span.seconds, 1e-9):,.0f} tokens/s")
    if "useful" in span.counted:
        counted.append(f"{span.counted['useful']:.0%} useful work")
    outcome = {"failure": "failed", "lost": "lost when its driver died", "running": "still running"}.get(span.outcome)
    length = exact_duration(span.seconds)
    if not span.is_end_known:
        length = f"at least {length}" if span.seconds else "of unknown length"
    words = [f"{span.folder} {span.stage}: {length}", *counted, *([outcome] if outcome else [])]
    return ", ".join(words)


def _examples(views: Sequence[RunView], names: Sequence[str]) -> list[dict[str, Any]]:
    others = [{example.prompt_id: example for example in view.examples} for view in views[1:]]
    found = []
    for number, example in enumerate(views[0].examples):
        answers = []
        same = [(names[0], example)]
        same += [(name, by_id[example.prompt_id]) for name, by_id in zip(names[1:], others, strict=True)
                 if example.prompt_id in by_id]  # fmt: skip
        for name, one in same:
            for iterate, text in one.answers.items():
                label = f"{name}: {iterate}" if len(views) > 1 else iterate
                answers.append((label, text, one.margins.get(iterate)))
        newest = list(example.margins.values())[-1:] or [None]
        found.append(
            {
                "number": number, "messages": [message for message in example.messages if message["content"]],
                "human": example.human, "answers": answers, "margin": newest[0],
            }
        )  # fmt: skip
    return sorted(found, key=lambda it: -math.inf if it["margin"] is None else it["margin"], reverse=True)


def _differing(views: Sequence[RunView]) -> list[tuple[str, list[Any]]]:
    facts = []
    for view in views:
        inputs = {f"digest of {name}": (value or "none")[:16] for name, value in view.description["inputs"].items()}
        facts.append(view.settings | inputs | {f"{key} version": it for key, it in view.versions[-1][1].items()})
    keys = dict.fromkeys(key for fact in facts for key in fact)
    rows = [(key, [fact.get(key, "–") for fact in facts]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
