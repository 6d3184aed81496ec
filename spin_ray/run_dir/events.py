"""A run's events.jsonl as stages in time."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
BESIDE = ("benchmarks", "judging")
"""Stages that other commands run, maybe beside the driver."""


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
