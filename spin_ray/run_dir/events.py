"""A run's events.jsonl as stages in time."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.storage import Storage

logger = logging.getLogger(__name__)

Event = dict[str, Any]
EVENTS = "events.jsonl"
BESIDE = ("benchmarks", "judging")
"""Stages that other commands run, maybe beside the driver."""


def write_event(storage: Storage, event: str, stage: str, **values: Any) -> None:
    """Adds a line to the log."""
    line = {"time": round(time.time(), 3), "event": event, "stage": stage, **values}
    storage.append(EVENTS, json.dumps(line) + "\n")


def read_events(storage: Storage) -> list[Event]:
    """The complete lines of the log."""
    return read_json_lines(storage, EVENTS)


def read_json_lines(storage: Storage, name: str) -> list[dict[str, Any]]:
    """Complete lines of a log; a line that a crash cut short is left out."""
    try:
        text = storage.read(name).decode()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


@contextmanager
def stage(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
    """Logs start, then commit or failure with wall time; the body adds what it counted to the yielded dict.

    ``tokens`` become ``tokens_per_s`` of wall time. ``work_s``, the seconds of generating, scoring and stepping
    (mean over replicas), becomes ``useful``, their share of wall time: the rest is starting, loading, writing.
    """
    counted: dict[str, Any] = {}
    write_event(storage, "start", name)
    started = time.monotonic()
    try:
        yield counted
    except BaseException as error:
        with suppress(StageError, RunDirError):  # a log that cannot be written must not hide why the stage failed
            write_event(
                storage,
                "failure",
                name,
                seconds=round(time.monotonic() - started, 3),
                error=f"{type(error).__name__}: {error}"[:500],
            )
        raise
    seconds = time.monotonic() - started
    if "tokens" in counted:
        counted["tokens_per_s"] = round(counted["tokens"] / seconds, 1)
    if "work_s" in counted:
        counted["useful"] = round(counted.pop("work_s") / seconds, 3)
        logger.info("%s: %.0f s, %.0f %% of it useful work", name, seconds, 100 * counted["useful"])
    write_event(storage, "commit", name, seconds=round(seconds, 3), **counted)


def was_cut_off(storage: Storage, stage: str) -> bool:
    """Whether the last attempt at a stage began and did not commit: what it had in hand was lost."""
    told = [event["event"] for event in read_events(storage) if event["stage"] == stage and event["event"] != "lost"]
    return bool(told) and told[-1] != "commit"


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt at a stage. Example: ``Span("iter_000", "training", 12.0, 74.5, "commit", {"rows": 64, …})``."""

    folder: str
    """``run`` for what belongs to no iterate."""
    stage: str
    start: float
    """Unix time, seconds."""
    end: float
    outcome: str
    """``commit``, ``failure``, ``lost`` (its driver died) or ``running``."""
    counted: dict[str, Any]
    """Rows, tokens and whatever else the stage counted."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


def split_stage(stage: str) -> tuple[str, str]:
    """(folder, stage) of an event.

    One opponent answers held-out and training prompts in one go: that is counted where its held-out samples are.
    """
    folder, _, name = stage.partition(" ")[0].rpartition("/")
    return folder or "run", "sampling" if name in ("heldout_samples", "generations") else name


def spans(events: list[Event]) -> list[Span]:
    """Every attempt at every stage, in order. A start that was followed by another one was lost with its driver."""
    found: list[Span] = []
    open_stages: dict[str, float] = {}
    latest = 0.0
    for event in events:
        stage, kind = event["stage"], event["event"]
        if kind == "start":
            if split_stage(stage)[1] not in BESIDE:  # the driver runs one at a time: what is still open was lost
                for name in [name for name in open_stages if split_stage(name)[1] not in BESIDE]:
                    started = open_stages.pop(name)
                    found.append(Span(*split_stage(name), started, max(latest, started), "lost", {}))
            open_stages[stage] = event["time"]
        elif kind in ("commit", "failure"):
            open_stages.pop(stage, None)
            counted = {key: value for key, value in event.items() if key not in ("time", "event", "stage")}
            started = event["time"] - event["seconds"]
            found.append(Span(*split_stage(stage), started, event["time"], kind, counted))
        latest = event["time"]
    found += [Span(*split_stage(name), started, latest, "running", {}) for name, started in open_stages.items()]
    return found


def duration(seconds: float) -> str:
    """Returns about how long that is: ``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def exact_duration(seconds: float) -> str:
    """Returns ``163 ms``, ``45 s``, ``9 min 48 s`` or ``3 h 5 min``."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds * 1000:.0f} ms"
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def lost_work(events: list[Event]) -> dict[str, int]:
    """What was in hand when something died, and was done again: ``{"shards": 2, "steps": 7}``; shards at most so many
    after the driver itself ended.
    """
    lost = [event for event in events if event["event"] == "lost"]
    return {what: sum(event.get(what, 0) for event in lost) for what in ("shards", "steps")}


def stage_seconds(events: list[Event]) -> dict[str, dict[str, float]]:
    """Wall seconds by iterate and stage, summed over attempts, e.g. ``{"iter_000": {"training": 61.2}}``."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event["event"] in ("commit", "failure"):
            folder, stage = split_stage(event["stage"])
            seconds[folder][stage] += event["seconds"]
    return {folder: dict(stages) for folder, stages in seconds.items()}
