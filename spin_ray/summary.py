"""A run in a table, for the end of a run and for ``spin-ray status``."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from spin_ray.config import SpinConfig
from spin_ray.history import lost_work, read_evaluations, read_examples, stage_seconds
from spin_ray.measures import MEASURES, Evaluation, warnings
from spin_ray.run_dir import RunDir, iterate_number

EXAMPLES = 3


def print_summary(run: RunDir, console: Console) -> None:
    """Iterates side by side, examples, and how to go on."""
    config = run.config()
    evaluations = read_evaluations(run, config)
    console.print(_iterates(evaluations))
    console.print(_seconds(stage_seconds(run)))
    if evaluations:
        _print_examples(run, config, console)
    # Paths and errors are no markup: rich takes [/tmp/x] for the end of a style.
    console.print(f"Run:    {run.storage.root}", markup=False)
    latest = run.latest()
    model = run.storage.where(run.model(iterate_number(latest) if latest else config.iterations).path)
    console.print(f"Model:  {model} (LATEST: {latest})", markup=False)
    console.print(f"Go on:  spin-ray status {run.storage.root}", markup=False)


def print_status(run: RunDir, console: Console) -> None:
    """What is committed, what the last event was, and the measures so far."""
    config = run.config()
    events = run.events()
    evaluations = read_evaluations(run, config)
    console.print(_measures(evaluations))
    for evaluation in evaluations:
        for text in warnings(evaluation, evaluations[0] if evaluation is not evaluations[0] else None):
            console.print(f"[yellow]Warning[/] {evaluation['iterate']}:", end=" ")
            console.print(text, markup=False)
    console.print(_seconds(stage_seconds(run)))
    if any((lost := lost_work(events)).values()):
        console.print(f"Lost to failures and done again: {lost['shards']} shards (at most), {lost['steps']} steps")
    for event in events[-1:]:
        detail = {name: value for name, value in event.items() if name not in ("time", "event", "stage")}
        line = f"Last event: {event['event']} {event['stage']} {json.dumps(detail) if detail else ''}"
        console.print(line, markup=False)
    console.print(f"LATEST: {run.latest() or 'nothing published yet'}; iterations wanted: {config.iterations}")


def _iterates(evaluations: list[dict[str, Any]]) -> Table:
    table = Table(title="Held-out rows, fresh samples of each iterate")
    for name in ("iterate", "loss", "margin", "margin acc.", "answer acc.", "length y", "length y′", "cut", "y=y′"):
        table.add_column(name, justify="left" if name == "iterate" else "right", no_wrap=name == "iterate")
    for evaluation in evaluations:
        against = evaluation.get("against_opponent", {})
        table.add_row(
            evaluation["iterate"],
            _number(against.get("loss"), 4),
            _number(against.get("margin"), 3),
            _number(against.get("accuracy"), 2),
            _number(evaluation.get("answer_accuracy"), 3),
            _number(evaluation["real_length"], 1),
            _number(evaluation["generated_length"], 1),
            _number(evaluation["truncation_rate"], 2),
            _number(evaluation["identical_share"], 2),
        )
    return table


def _measures(evaluations: list[Evaluation]) -> Table:
    """Every measure that has a value, iterates side by side."""
    table = Table(title="Held-out rows, fresh samples of each iterate")
    table.add_column("measure")
    for evaluation in evaluations:
        table.add_column(evaluation["iterate"], justify="right", no_wrap=True)
    for measure in MEASURES:
        values = [measure.of(evaluation) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.add_row(measure.title, *[_number(value, measure.digits) for value in values])
    return table


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
    """A few held-out prompts with the human answer and each iterate's."""
    for example in read_examples(run, config, limit=EXAMPLES):
        console.rule(style="dim")
        for message in example.messages:
            console.print(f"[bold]{message['role']}[/]", end="  ")
            console.print(message["content"], markup=False, emoji=False)
        console.print("[bold green]human[/]", end="  ")
        console.print(example.human, markup=False, emoji=False)
        for name, answer in example.answers.items():
            console.print(f"[bold cyan]{name}[/]", end="  ")
            console.print(answer, markup=False, emoji=False)
    console.rule(style="dim")
