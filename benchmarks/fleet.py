"""Simulates nodes that fail and come back under the driver's rules, as discrete events."""

import heapq
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.disk import checkpoint_bytes
from spin_ray.planning.generation_cost import ENGINE_START_S
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import WORKERS_START_S
from spin_ray.planning.model_shape import ModelShape
from spin_ray.runtime.workers import ELASTIC_PLACING_S

HOUR = 3600.0
GPU_MTBF_S = 54 * 24 * HOUR * 16_384 / 419
"""Seconds between failures of one GPU: 419 in 54 days on 16,384 (Llama 3, arXiv 2407.21783, section 3.3.4)."""
SLOW_NODES, SLOWDOWN = 0.005, 1.10
"""Share of slow nodes, and a slow node's time over another's (MegaScale, arXiv 2402.15627; cited from memory)."""
STEP_NOISE = 0.02
"""Standard deviation of a node's step time over its mean: an assumption."""
NOTICE_S = 20.0
"""Longest time until Ray notices a lost node."""
STORAGE = 2 * GB
"""Bytes/s at which one node writes or reads a checkpoint: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    nodes: int
    mtbf_s: float = 8 * GPU_MTBF_S
    """Mean seconds between failures of a node."""
    replaced_s: float = 600.0
    """Mean seconds from noticing a loss until a node is back."""
    slow: float = SLOW_NODES
    noise: float = STEP_NOISE


@dataclass(frozen=True, kw_only=True)
class Rules:
    checkpoint_every_steps: int
    max_failures: int
    generation_failures: int
    lease_timeout_s: float
    resize_interval_s: float
    least_nodes: int
    """Fewest nodes that train (``train.min_workers``; not set: all)."""
    checkpoint_s: float
    engine_start_s: float

    @classmethod
    def of(cls, config: SpinConfig, shape: ModelShape, nodes: int) -> "Rules":
        train = config.train
        per_node = train.workers / nodes
        return cls(
            checkpoint_every_steps=train.checkpoint_every_steps,
            max_failures=train.max_failures,
            generation_failures=config.generation.max_failures,
            lease_timeout_s=config.storage.lease_timeout_s,
            resize_interval_s=train.resize_interval_s,
            least_nodes=ceil(train.min_workers / per_node) if train.min_workers else nodes,
            checkpoint_s=checkpoint_bytes(config, train.optimizer, shape.parameters) / nodes / STORAGE,
            engine_start_s=ENGINE_START_S["eager" if config.generation.engine.enforce_eager else "compiled"],
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    shards: int
    shard_s: float
    engines: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """Steps of all nodes. Scoring and evaluation are one step each, as they commit only at their end."""

    steps: int
    step_s: float
    start_s: float = WORKERS_START_S
    """Seconds until workers run; 0 for scoring, which shares training's workers."""


Stage = Generation | Training


@dataclass(kw_only=True)
class Told:
    """Result of a run. Times are in seconds; ``lost`` and ``waited`` are sums over nodes."""

    seconds: float = 0.0
    ideal: float = 0.0
    lost: float = 0.0
    waited: float = 0.0
    saving: float = 0.0
    failures: int = 0
    submissions: int = 1

    @property
    def goodput(self) -> float:
        return self.ideal / self.seconds


DRIVER = -1
"""The driver's node, which has no engine and no worker."""


@dataclass
class World:
    """Nodes that fail and come back, and the queue of events."""

    fleet: Fleet
    rng: np.random.Generator
    now: float = 0.0
    up: set[int] = field(default_factory=set)
    slowness: dict[int, float] = field(default_factory=dict)
    _queue: list[tuple[float, int, str, Any]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        for node in (DRIVER, *range(self.fleet.nodes)):
            self._start(node)

    def after(self, seconds: float, what: str, which: Any = None) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + seconds, self._count, what, which))

    def next(self) -> tuple[str, Any]:
        """Returns the next event; ``up`` already includes it."""
        self.now, _, what, which = heapq.heappop(self._queue)
        if what == "fail":
            self.up.discard(which)
            self.after(NOTICE_S + self.rng.exponential(self.fleet.replaced_s), "back", which)
        elif what == "back":
            self._start(which)
        return what, which

    def _start(self, node: int) -> None:
        self.up.add(node)
        self.slowness[node] = SLOWDOWN if self.rng.random() < self.fleet.slow else 1.0
        self.after(self.rng.exponential(self.fleet.mtbf_s), "fail", node)

    @property
    def workers(self) -> set[int]:
        return self.up - {DRIVER}


def simulate(stages: list[Stage], fleet: Fleet, rules: Rules, seed: int) -> Told:
    world, told = World(fleet, np.random.default_rng(seed)), Told()
    for stage in stages:
        if isinstance(stage, Generation):
            told.ideal += rules.engine_start_s + ceil(stage.shards / stage.engines) * stage.shard_s
            _generate(world, stage, rules, told)
        else:
            told.ideal += stage.start_s + stage.steps * stage.step_s
            _train(world, stage, rules, told)
    told.seconds = world.now
    return told


def _submitted_again(world: World, rules: Rules, told: Told) -> None:
    told.submissions += 1
    world.after(rules.lease_timeout_s, "lease")
    stale = False
    while not (stale and DRIVER in world.up):
        what, _ = world.next()
        stale = stale or what == "lease"


def _generate(world: World, stage: Generation, rules: Rules, told: Told) -> None:
    """Simulates generation: a lost node loses its engines' shards. Events of earlier ``turn`` are ignored."""
    engines = list(range(stage.engines))
    node_of = {engine: engine * world.fleet.nodes // stage.engines for engine in engines}
    left, done, began, worked = stage.shards, 0, world.now, 0.0
    turn, deaths = dict.fromkeys(engines, 0), dict.fromkeys(engines, 0)
    busy: dict[int, float] = {}
    idle: list[int] = []

    def start(which: list[int]) -> None:
        for engine in which:
            turn[engine] += 1
            if node_of[engine] in world.up:
                world.after(rules.engine_start_s, "started", (engine, turn[engine]))

    def lose(which: list[int]) -> None:
        nonlocal left, idle
        idle = [engine for engine in idle if engine not in which]
        for engine in which:
            turn[engine] += 1
            if engine in busy:
                told.lost += (world.now - busy.pop(engine)) * world.fleet.nodes / stage.engines
                left += 1

    start(engines)
    while done < stage.shards:
        what, which = world.next()
        if what in ("started", "shard") and turn[which[0]] == which[1]:
            if what == "shard":
                done += 1
                worked += world.now - busy.pop(which[0])
            idle.append(which[0])
        elif what == "fail":
            mine = engines if which == DRIVER else [engine for engine in engines if node_of[engine] == which]
            told.failures += 1
            lose(mine)
            for engine in mine:
                deaths[engine] += which != DRIVER
            if which == DRIVER or max(deaths.values()) > rules.generation_failures:
                lose(engines)
                deaths = dict.fromkeys(engines, 0)
                _submitted_again(world, rules, told)
                start(engines)
        elif what == "back":
            start([engine for engine in engines if node_of[engine] == which])
        while idle and left:
            engine, left = idle.pop(), left - 1
            busy[engine] = world.now
            noise = world.slowness[node_of[engine]] * world.rng.normal(1, world.fleet.noise)
            world.after(stage.shard_s * noise, "shard", (engine, turn[engine]))
    told.waited += ((world.now - began) * stage.engines - worked) * world.fleet.nodes / stage.engines


def _train(world: World, stage: Training, rules: Rules, told: Told) -> None:
    """Simulates stretches of steps that end with a checkpoint: a lost node undoes the stretch."""
    done, steps, failures, attempt = 0, 0, 0, 0
    start_s = stage.start_s
    while done < stage.steps:
        _wait_for_nodes(world, rules, told)
        group, attempt = set(world.workers), attempt + 1
        began = world.now
        world.after(start_s + (rules.checkpoint_s if done else 0.0), "ready", attempt)
        start_s = WORKERS_START_S
        if len(group) < world.fleet.nodes:
            world.after(rules.resize_interval_s, "resize", attempt)
        running = False
        while done < stage.steps:
            what, which = world.next()
            if what in ("ready", "stretch") and which == attempt:
                if running:
                    done += steps
                else:
                    told.waited += (world.now - began) * len(group)
                if done < stage.steps:
                    running, began = True, world.now
                    steps = min(rules.checkpoint_every_steps, stage.steps - done)
                    saving = rules.checkpoint_s if done + steps < stage.steps else 0.0
                    told.saving += saving
                    took = steps * stage.step_s * world.fleet.nodes / len(group) * _slowest(world, group)
                    world.after(took + saving, "stretch", attempt)
            elif what == "resize" and which == attempt:
                if len(world.workers) > len(group):
                    told.lost += (world.now - began) * len(group) * running
                    break
                world.after(rules.resize_interval_s, "resize", attempt)
            elif what == "fail" and (which in group or which == DRIVER):
                told.failures += 1
                told.lost += (world.now - began) * len(group) * running
                failures += which != DRIVER
                if which == DRIVER or failures > rules.max_failures:
                    failures = 0
                    _submitted_again(world, rules, told)
                break


def _wait_for_nodes(world: World, rules: Rules, told: Told) -> None:
    """Waits for all nodes; after ``ELASTIC_PLACING_S``, ``least_nodes`` are enough."""
    began, enough = world.now, world.fleet.nodes
    if rules.least_nodes < enough:
        world.after(ELASTIC_PLACING_S, "fewer", began)
    while len(world.workers) < enough or DRIVER not in world.up:
        up, before = len(world.workers), world.now
        what, which = world.next()
        told.waited += (world.now - before) * up
        if what == "fewer" and which == began:
            enough = rules.least_nodes


def _slowest(world: World, group: set[int]) -> float:
    """Returns the slowest node's time factor, a mean over steps; noise makes it grow with the group."""
    slow = max(world.slowness[node] for node in group)
    return slow * (1 + world.fleet.noise * float(world.rng.normal(0, 1, (64, len(group))).max(axis=1).mean()))
