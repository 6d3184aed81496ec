"""A run in tables, for its end and for ``spin-ray status``."""

import json
import shlex
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import OtherRunError
from spin_ray.report.examples import read_examples
from spin_ray.report.history import read_all_rows, read_evaluations
from spin_ray.report.measures import BY_KEY, MEASURES, Evaluation
from spin_ray.report.progress import read_progress
from spin_ray.report.signs import all_warnings
from spin_ray.report.tracking import NOT_LOGGED
from spin_ray.run_dir.events import (
    BESIDE,
    Event,
    Span,
    counted_in,
    duration,
    lost_work,
    of_driver,
    spans,
    stage_seconds,
    stage_warnings,
)
from spin_ray.run_dir.lease import Driver, find_driver
from spin_ray.run_dir.names import iterate_number
from spin_ray.run_dir.run_dir import RunDir, open_run

EXAMPLES = 3
LONGEST_EXAMPLE = 400
"""Most shown characters of a text."""
RECENT_STEPS = 10
"""Number of newest training steps to average."""
_MAIN = {
    "loss": "against_opponent.loss", "margin": "against_opponent.margin", "margin acc.": "against_opponent.accuracy",
    "answer acc.": "answer_accuracy", "length y": "real_length", "length y′": "generated_length",
    "cut": "truncation_rate", "y=y′": "identical_share",
}  # fmt: skip
"""Keys of the main measures, by short titles."""


def print_summary(run: RunDir, console: Console) -> None:
    config = run.config()
    evaluations = read_evaluations(run, config)
    console.print(iterates_table(evaluations))
    console.print(_seconds(stage_seconds(run.events())))
    if evaluations:
        _print_examples(run, config, console)
    # markup=False for paths and errors: rich reads [/tmp/x] as the end of a style.
    console.print(f"Run:    {run.storage.root}", markup=False)
    latest = run.latest()
    model = run.storage.where(run.model(iterate_number(latest) if latest else config.iterations).path)
    console.print(f"Model:  {model} (LATEST: {latest})", markup=False)
    words = "Go on:  "
    for command in ("status", "report", "serve", "eval"):
        console.print(f"{words}spin-ray {command} {shlex.quote(str(run.storage.root))}", markup=False, soft_wrap=True)
        words = " " * len(words)


def print_difference(error: OtherRunError, console: Console) -> None:
    """Prints the settings in which a run (-) and the recipe (+) differ."""
    console.print(f"error: {error.root}: holds another run; restore what it was begun with (-)", markup=False)
    console.print("       or choose another --out for what the recipe says now (+)", markup=False)
    for key, pair in error.differing.items():
        for sign, style, value in zip("-+", ("red", "green"), pair, strict=True):
            if value is not None:
                line = f"{sign} {key}: {json.dumps(value, default=str)}"
                console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def status_as_json(run: RunDir) -> dict[str, Any]:
    """Returns the status as JSON values. Times are Unix times or seconds."""
    config, events = run.config(), run.events()
    evaluations = read_evaluations(run, config)
    of_stages = [(folder, text) for text, folders in stage_warnings(events).items() for folder in folders]
    warnings = [*_warnings(run, config, evaluations), *of_stages]
    return {
        "run": str(run.storage.root),
        "latest": run.latest(),
        "iterations": config.iterations,
        "evaluations": evaluations,
        "warnings": [{"iterate": iterate, "text": text} for iterate, text in warnings],
        "seconds": stage_seconds(events),
        "lost": lost_work(events),
        "running": (running := is_running(run)),
        "progress": read_progress(run) if running else {},
        "beside": [f"{span.folder}/{span.stage}" for span in _beside(events)],
        "last_event": events[-1] if events else None,
    }


def print_status(run: RunDir, console: Console) -> None:
    config = run.config()
    events = run.events()
    evaluations = read_evaluations(run, config)
    if evaluations:
        console.print(_measures(evaluations))
    for iterate, text in _warnings(run, config, evaluations):
        _print_warning(iterate, text, console)
    for text, folders in stage_warnings(events).items():
        _print_warning(", ".join(folders), text, console)
    console.print(_seconds(stage_seconds(events)))
    if any((lost := lost_work(events)).values()):
        console.print(f"Lost in failures and done again: at most {lost['shards']} shards, {lost['steps']} steps")
    _print_running(run, events, console)
    for event in events[-1:]:
        detail = counted_in(event)
        line = f"Last event: {event['event']} {event['stage']} {json.dumps(detail) if detail else ''}"
        console.print(line, markup=False)
    console.print(f"LATEST: {run.latest() or 'nothing published yet'}; iterations wanted: {config.iterations}")


def _warnings(run: RunDir, config: SpinConfig, evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    return all_warnings(evaluations, read_all_rows(run, evaluations), config.generation.sampling.max_tokens)


def _print_warning(where: str, text: str, console: Console) -> None:
    console.print(f"[yellow]Warning[/] {where}:", end=" ")
    console.print(text, markup=False)


def show_status(run: RunDir, console: Console, as_json: bool) -> None:
    """Prints tables, or one JSON object in a line."""
    if as_json:
        console.out(json.dumps(status_as_json(run)), highlight=False)
    else:
        print_status(run, console)


def what_is_kept(out: str) -> str:
    """Returns what a stopped run keeps and the command that goes on; empty if the run has not begun."""
    try:
        run = open_run(out)
        if not run.storage.exists("run.json"):
            return ""
        newest = run.latest()
    except Exception:  # an unreadable folder may be what stopped the run
        return ""
    iterates = f"the iterates up to {newest}, and " if newest else ""
    return (
        f"\n{out} keeps {iterates}every finished stage, shard of generation and training checkpoint; "
        f"go on with: {shlex.join(['spin-ray', *sys.argv[1:]])}\n"
    )


def is_running(run: RunDir) -> bool:
    """Tells whether a driver holds the run's lease and lives, in a stage or between two."""
    driver = _find_driver(run)
    return driver is not None and driver.lives


def _find_driver(run: RunDir) -> Driver | None:
    return find_driver(run.storage, run.config().storage.lease_timeout_s)


def _beside(events: list[Event]) -> list[Span]:
    """Returns the open stages of other commands, which may have died."""
    return [span for span in spans(events) if span.outcome == "running" and span.stage in BESIDE]


def _print_running(run: RunDir, events: list[Event], console: Console) -> None:
    for span in _beside(events):
        begun = duration(time.time() - span.start)
        console.print(f"Beside the run: {span.folder} {span.stage}, begun {begun} ago, not ended", markup=False)
    last = next(iter(spans(of_driver(events))[-1:]), None)
    if last is None or last.outcome != "running":
        return
    driver = _find_driver(run)
    if driver is None or not driver.lives:
        why = f"{driver.name} is gone" if driver else "no driver has the run"
        console.print(f"Stopped during {last.folder} {last.stage}: {why}; the same command goes on", markup=False)
        return
    log = run.train_log(last.folder) if last.stage == "training" else []
    if log:
        console.print(_training(last.folder, log))
    state = read_progress(run)
    if state.get("time", 0) >= last.start:
        line = f"Running: {state['line']} (written {duration(time.time() - state['time'])} ago)"
    else:
        line = f"Running: {last.folder} {last.stage} for {duration(time.time() - last.start)}"
    console.print(line, markup=False)


def _training(folder: str, log: list[dict[str, Any]]) -> Table:
    recent, newest = log[-RECENT_STEPS:], log[-1]
    table = Table(title=f"{folder} training, step {newest['step'] + 1} of {newest['of']}")
    for name in ("measure", "first", f"mean of {len(recent)}", "newest"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for key in newest:
        if key not in NOT_LOGGED:
            mean = sum(line[key] for line in recent) / len(recent)
            table.add_row(key, *[f"{value:,.5g}" for value in (log[0][key], mean, newest[key])])
    seconds = sum(line["seconds"] for line in recent)
    table.add_row("tokens/s", "", f"{sum(line['tokens'] for line in recent) / max(seconds, 1e-9):,.0f}", "")
    return table


def iterates_table(evaluations: list[dict[str, Any]]) -> Table:
    """Returns the main measures, a row per iterate."""
    table = Table(title="Held-out rows, fresh samples of each iterate")
    table.add_column("iterate", no_wrap=True)
    for name in _MAIN:
        table.add_column(name, justify="right")
    measures = [BY_KEY[key] for key in _MAIN.values()]
    for evaluation in evaluations:
        table.add_row(evaluation["iterate"], *[_number(it.of(evaluation), it.digits) for it in measures])
    return table


def _measures(evaluations: list[Evaluation]) -> Table:
    table = Table(title="Held-out rows, fresh samples of each iterate")
    table.add_column("measure")
    for evaluation in evaluations:
        table.add_column(evaluation["iterate"], justify="right", no_wrap=True)
    for measure in MEASURES:
        values = [measure.of(evaluation) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.add_row(measure.title, *[_number(value, measure.digits) for value in values])
            if measure.key == "answer_accuracy" and any(map(measure.interval, evaluations)):
                table.add_row("  95 % interval", *[_interval(measure.interval(it)) for it in evaluations])
    return table


def _interval(bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f}–{bounds[1]:.3f}"


def _seconds(seconds: dict[str, dict[str, float]]) -> Table:
    stages = list(dict.fromkeys(stage for spent in seconds.values() for stage in spent))
    table = Table(title="Seconds per stage")
    table.add_column("folder", no_wrap=True)
    for stage in stages:
        table.add_column(stage, justify="right")
    for folder, spent in seconds.items():
        table.add_row(folder, *[_number(spent.get(stage), 0) for stage in stages])
    return table


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _print_examples(run: RunDir, config: SpinConfig, console: Console) -> None:
    wanted, measured = config.evaluation.examples, config.generation.sampling.temperature
    examples = read_examples(run, config, limit=wanted, to_read=True) if wanted else []
    if examples:
        read = config.evaluation.examples_temperature
        console.print(f"Answers to held-out rows, at temperature {read:g} (the measures read others, at {measured:g})")
    else:
        examples = read_examples(run, config, limit=EXAMPLES)
        console.print(f"Answers to held-out rows, at temperature {measured:g}")
    for example in examples:
        console.rule(style="dim")
        for message in example.messages:
            if message["content"]:
                _print_said(console, message["role"], "bold", message["content"])
        _print_said(console, "human", "bold green", example.human)
        for name, answer in example.answers.items():
            _print_said(console, name, "bold cyan", answer)
    console.rule(style="dim")


def _print_said(console: Console, who: str, style: str, text: str) -> None:
    console.print(f"[{style}]{who}[/]", end="  ")
    console.print(text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} …", markup=False, emoji=False)
