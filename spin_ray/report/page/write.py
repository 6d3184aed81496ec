"""The HTML page, from views of runs."""

import math
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from spin_ray.errors import writing
from spin_ray.report.conditions import in_words
from spin_ray.report.first_loss import first_loss, spelt
from spin_ray.report.harness_warnings import sentences
from spin_ray.report.measures import BY_KEY, GUESSING, MEASURES, Measure
from spin_ray.report.page.charts import COLOURS, MOST_POINTS, Bar, Series, gantt, line_chart
from spin_ray.report.page.comparison import compare
from spin_ray.report.page.view import RunView, read_view
from spin_ray.report.uncertainty import CONFIDENCE
from spin_ray.run_dir.events import Span, exact_duration
from spin_ray.run_dir.names import iterate_name, iterate_number
from spin_ray.run_dir.run_dir import RunDir

_STAGES = ("prompts", "heldout", "sampling", "pairs", "training", "evaluation")
"""Order of colours and lanes."""
_TRAIN_CHARTS = (
    ("Loss", "loss", "Of the pairs; objective.sft_weight comes on top."),
    ("Margin", "margin", "In nats times beta."),
    ("Margin accuracy", "accuracy", "Fraction of margins above 0."),
    ("Drift of log p(y)", "real_logp_drift", "log p(y) minus that at the iteration's start, in nats per response."),
    ("Gradient norm before clipping", "grad_norm", ""),
)
"""(title, key of train_log.jsonl, note)."""
_EVAL_CHARTS: tuple[tuple[str, ...], ...] = (
    ("answer_accuracy",),
    ("against_opponent.loss", "against_self.loss"),
    ("against_opponent.margin", "against_self.margin"),
    ("jsd_lower_bound",),
    ("kl_to_base", "against_self.generated_logp_drift"),
    ("real_logp_drift", "against_opponent.generated_logp_drift"),
    ("generated_length", "real_length"),
    ("truncation_rate", "identical_share", "duplicate_share"),
    ("distinct_2", "real_distinct_2"),
)
"""Measures of each chart. Where runs are compared, a chart shows the first alone."""
_OWN_OPPONENT = (
    " A point without a line is against the iterate's own opponent, the iterate before it: do not rank iterates by it."
)
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
    environment.filters |= {"duration": exact_duration, "number": _number, "code": _code}
    return environment.get_template("report.html").render(
        views=views,
        names=names,
        comparisons=[compare(views[0], view, names[0], name) for view, name in zip(views[1:], names[1:], strict=True)],
        key=max(views, key=lambda view: len(view.evaluations)).key(),
        measures=_table(views),
        benchmarks=_benchmarks(views),
        benchmark_warnings=list(_benchmark_warnings(views, names)),
        judged=[(name, it) for view, name in zip(views, names, strict=True) for it in view.judged],
        eval_charts=list(_eval_charts(views, names)),
        train_charts=list(_train_charts(views, names)),
        first_level=_first_level(views),
        gantts=[gantt(_bars(view)) for view in views],
        colours={name: colour for colour, name in enumerate(_few(names))},
        examples=_examples(views, names),
        differing=_differing(views),
        version=version("spin-ray"),
    )


def _distinct_names(views: Sequence[RunView]) -> list[str]:
    names = [view.name for view in views]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _table(views: Sequence[RunView]) -> list[tuple[Measure, list[tuple[str, str]]]]:
    """Returns rows (measure, [(value, its interval) per iterate]) with any value."""
    evaluations = [evaluation for view in views for evaluation in view.evaluations]
    return [
        (measure, [(_number(measure.of(it), measure.digits), measure.spread(it)) for it in evaluations])
        for measure in MEASURES
        if any(measure.of(it) is not None for it in evaluations)
    ]


def _benchmarks(views: Sequence[RunView]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Returns the rows of the table; results of other conditions stand in another row."""
    columns = [_by_title(view.benchmarks.get(iterate, {})) for view in views for iterate in view.benchmarked]
    found = []
    for title, metric in dict.fromkeys(row for column in columns for row in column):
        values = [column.get((title, metric), {}) for column in columns]
        cells = [
            (_number(it.get("value"), 4), f"± {CONFIDENCE * error:,.4f}" if (error := it.get("standard_error")) else "")
            for it in values
        ]
        found.append((title, metric, cells))
    return found


def _benchmark_warnings(views: Sequence[RunView], names: Sequence[str]) -> Iterator[str]:
    for name, view in zip(names, views, strict=True):
        for iterate, results in view.benchmarks.items():
            place = f"{name}, {iterate}" if len(views) > 1 else iterate
            yield from (f"{place}, {warning}" for warning in sentences(results.values()))


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
    shown = _few(list(zip(views, names, strict=True)))
    for keys in _EVAL_CHARTS:
        evaluations = [evaluation for view, _ in shown for evaluation in view.evaluations]
        measures = [BY_KEY[key] for key in (keys[:1] if compared else keys)]
        drawn = [measure for measure in measures if any(measure.of(it) is not None for it in evaluations)]
        lines = [
            _line(view, measure, name if compared else measure.title, run + n)
            for run, (view, name) in enumerate(shown)
            for n, measure in enumerate(drawn)
        ]
        lines = [line for line in lines if line.points]
        if len({x for line in lines for x, _ in line.points}) > 1:
            title = _listed([measure.title for measure in drawn])
            title = title[0].upper() + title[1:]
            level = (GUESSING, "ln 2") if "loss" in title else (0.0, "") if "drift" in keys[0] else None
            svg = line_chart(title, lines, x_label="iterate", x_names=x_names, baseline=level)
            first = drawn[0]
            note = f"{first.title}: {first.meaning}. {first.bad}"
            note += _OWN_OPPONENT if any(measure.is_of_own_opponent for measure in drawn) else ""
            note += _left_out(len(views), "runs")
            yield {"title": title, "svg": svg, "legend": lines if len(lines) > 1 else [], "note": note}


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _few(drawn: Sequence[Any]) -> list[Any]:
    """Returns as many as there are colours: the first and the last ones."""
    return [*drawn] if len(drawn) <= COLOURS else [drawn[0], *drawn[1 - COLOURS :]]


def _left_out(number: int, what: str) -> str:
    return "" if number <= COLOURS else f" Of {number} {what} the first and the last {COLOURS - 1} are drawn."


def _line(view: RunView, measure: Measure, name: str, colour: int) -> Series:
    evaluations = [(float(iterate_number(it["iterate"])), it) for it in view.evaluations]
    found = [(place, measure.of(it), measure.interval(it)) for place, it in evaluations]
    measured = [(place, value, interval) for place, value, interval in found if value is not None]
    points = [(place, value) for place, value, _ in measured]
    intervals = [interval for _, _, interval in measured]
    return Series(name, points, colour, intervals, joined=not measure.is_of_own_opponent)


def _train_charts(views: Sequence[RunView], names: Sequence[str]) -> Iterator[Chart]:
    logs = [
        (f"{name}: {folder}" if len(views) > 1 else folder, folder, log)
        for view, name in zip(views, names, strict=True)
        for folder, log in view.train_logs.items()
    ]
    warm_ups = [(label, log) for label, folder, log in logs if folder == "sft"]
    rows = {view.config.sft.global_batch_rows for view in views if view.config.sft}
    yield from _chart("SFT warm-up: loss per token", warm_ups, "loss", _batches(rows, "rows"))
    logs = [(label, log) for label, folder, log in logs if folder != "sft"]
    pairs = {view.config.train.global_batch_pairs for view in views}
    clips = {view.config.train.optimizer.max_grad_norm for view in views}
    for title, key, note in _TRAIN_CHARTS:
        if key == "grad_norm" and len(clips) == 1:
            note = f"Clipped at {min(clips):g}."
        level = _first_level(views) if key == "loss" else None
        yield from _chart(title, logs, key, f"{_batches(pairs, 'pairs')} {note}".strip(), level)


def _batches(sizes: set[int], what: str) -> str:
    size = f"{min(sizes):,} " if len(sizes) == 1 else ""
    return f"Each point is one batch of {size}{what}."


def _first_level(views: Sequence[RunView]) -> tuple[float, str] | None:
    """Returns the loss of step 0 and its text, if all runs share it."""
    levels = {first_loss(view.config) for view in views}
    level = levels.pop() if len(levels) == 1 else None
    return None if level is None else (level, spelt(level))


def _chart(
    title: str,
    logs: list[tuple[str, list[dict[str, Any]]]],
    key: str,
    note: str,
    level: tuple[float, str] | None = None,
) -> Iterator[Chart]:
    """Yields the chart of a key of train_log.jsonl, if a log has it."""
    lines = [Series(label, _points(log, key), colour) for colour, (label, log) in enumerate(_few(logs))]
    lines = [line for line in lines if line.points]
    if lines:
        svg = line_chart(title, lines, x_label="step", baseline=level)
        if any(len(line.points) > MOST_POINTS for line in lines):
            note = note.replace("is one batch", "is the mean of several batches, each")
        note += _left_out(len(logs), "trainings")
        yield {"title": title, "svg": svg, "legend": lines if len(lines) > 1 else [], "note": note}


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
    counted = [f"{span.counted[key]:,.0f} {key}" for key in ("rows", "steps", "tokens") if span.counted.get(key)]
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
                answers.append((label, text, one.margins.get(iterate), iterate in one.cut))
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


def _code(text: str) -> Markup:
    """Sets the words between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
