"""A run's events.jsonl: writing, reading, and attempts at stages.

A line has ``time``, ``event`` (start, commit, failure, lost, publish, stop, warning), ``stage``, ``folder``, ``kind``
and counts.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.names import is_iterate_name
from spin_ray.run_dir.storage import Storage

logger = logging.getLogger(__name__)

Event = dict[str, Any]
EVENTS = "events.jsonl"
_COMMON = ("time", "event", "stage", "folder", "kind")
RUN = "run"
"""Folder of events that belong to no iterate."""
BESIDE = ("benchmarks", "judging")
"""Stages of other commands, which can run beside the driver."""


def write_event(storage: Storage, event: str, stage: str, **values: Any) -> None:
    line = {"time": round(time.time(), 3), "event": event} | fields_of(stage) | values
    storage.append(EVENTS, json.dumps(line) + "\n")


def read_events(storage: Storage) -> list[Event]:
    return read_json_lines(storage, EVENTS)


def fields_of(stage: str) -> dict[str, str]:
    """Returns ``stage``, ``folder`` and ``kind`` of an event.

    ``iter_000/training`` gives ``iter_000`` and ``training``; ``prompts`` gives ``run`` and ``prompts``. Of ``A + B``
    only ``A`` counts.
    """
    if is_iterate_name(stage):
        return {"stage": stage, "folder": stage, "kind": ""}
    folder, _, kind = stage.partition(" ")[0].rpartition("/")
    return {"stage": stage, "folder": folder or RUN, "kind": kind}


def counted_in(event: Event) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in _COMMON}


def read_json_lines(storage: Storage, name: str) -> list[dict[str, Any]]:
    """Returns the complete lines of a log."""
    return parse_json_lines(storage.find(name) or b"")


def parse_json_lines(content: bytes) -> list[dict[str, Any]]:
    """Returns the objects of complete lines; damaged lines are left out."""
    lines = []
    for line in content.decode(errors="replace").split("\n")[:-1]:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


@contextmanager
def stage(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
    """Logs a stage's start, then its commit or failure.

    The body adds counts to the yielded dict. ``work_s``, seconds of useful work, becomes ``useful``, a fraction of wall
    time.
    """
    counted: dict[str, Any] = {}
    write_event(storage, "start", name)
    started = time.monotonic()
    try:
        yield counted
    except BaseException as error:
        with suppress(StageError, RunDirError):  # a failing log must not hide the stage's error
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
    """Tells whether the last attempt at a stage did not commit."""
    told = [event["event"] for event in read_events(storage) if event["stage"] == stage and event["event"] != "lost"]
    return bool(told) and told[-1] != "commit"


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt at a stage."""

    folder: str
    """Folder of the iterate, or RUN."""
    stage: str
    start: float
    """Unix time in seconds."""
    end: float
    """Unix time; the last sign of life if ``is_end_known`` is false."""
    outcome: str
    """``commit``, ``failure``, ``lost`` (its driver died) or ``running``."""
    counted: dict[str, Any]
    is_end_known: bool = True

    @property
    def seconds(self) -> float:
        return self.end - self.start


def spans(events: Iterable[Event], seen: float = 0.0) -> list[Span]:
    """Returns every attempt. An attempt of the driver was lost if the driver starts another stage before its end.

    ``seen`` is a time at which the driver was seen alive.
    """
    found: list[Span] = []
    open_stages: dict[tuple[str, str], float] = {}
    latest = 0.0
    for event in events:
        place, kind = (event["folder"], _shown(event["kind"])), event["event"]
        if kind == "start":
            if place[1] not in BESIDE:  # the driver runs one stage at a time, so an open one was lost
                for lost in [it for it in open_stages if it[1] not in BESIDE]:
                    started = open_stages.pop(lost)
                    found.append(Span(*lost, started, max(latest, started), "lost", {}, False))
            open_stages[place] = event["time"]
        elif kind in ("commit", "failure"):
            open_stages.pop(place, None)
            found.append(Span(*place, event["time"] - event["seconds"], event["time"], kind, counted_in(event)))
        elif kind == "lost" and "seconds" in event and place in open_stages:
            started = open_stages.pop(place)
            found.append(Span(*place, started, started + event["seconds"], "lost", {}))
        latest = event["time"]
    for place, started in open_stages.items():
        end = latest if place[1] in BESIDE else max(latest, seen)
        found.append(Span(*place, started, end, "running", {}, False))
    return found


def of_driver(events: Iterable[Event]) -> list[Event]:
    """Leaves out the stages of other commands, which can run beside the driver."""
    return [event for event in events if event["kind"] not in BESIDE]


def close_lost_attempt(storage: Storage, seen: float) -> None:
    """Logs the open attempt of a dead driver as lost. ``seen`` is the time at which that driver was last seen alive."""
    events = of_driver(read_events(storage))
    if not any(span.outcome == "running" for span in spans(events)):
        return
    start = [event for event in events if event["event"] == "start"][-1]
    if seen > start["time"]:
        seconds = round(seen - start["time"], 3)
        write_event(storage, "lost", start["stage"], seconds=seconds, why="the driver died")


def _shown(kind: str) -> str:
    return "sampling" if kind in ("heldout_samples", "generations") else kind


def duration(seconds: float) -> str:
    """Formats roughly, e.g. ``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def exact_duration(seconds: float) -> str:
    """Formats exactly, e.g. ``163 ms``, ``45 s`` or ``9 min 48 s``."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds * 1000:.0f} ms"
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def lost_work(events: list[Event]) -> dict[str, int]:
    """Sums lost shards and steps; shards are an upper bound if the driver died."""
    lost = [event for event in events if event["event"] == "lost"]
    return {what: sum(event.get(what, 0) for event in lost) for what in ("shards", "steps")}


def stage_warnings(events: list[Event]) -> dict[str, list[str]]:
    """Returns the folders of each warning of a stage, by its text. Warnings of a measure have no kind of stage."""
    folders: dict[str, dict[str, None]] = defaultdict(dict)
    for event in events:
        if event["event"] == "warning" and event["kind"]:
            folders[event["text"]][event["folder"]] = None
    return {text: list(found) for text, found in folders.items()}


def stage_seconds(events: list[Event]) -> dict[str, dict[str, float]]:
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event["event"] in ("commit", "failure", "lost") and "seconds" in event:
            seconds[event["folder"]][_shown(event["kind"])] += event["seconds"]
    return {folder: dict(stages) for folder, stages in seconds.items()}
