"""What do failures, slow nodes and autoscaling cost a run of days on 1 to 64 nodes?

A discrete-event simulation of the driver's rules. Its times are those of ``spin-ray plan``; nothing is measured.

    python benchmarks/simulation.py [--runs 20] [--write]     # --write: results/simulation.{json,md}

    generation   engines take shards from one queue; a lost node loses the shards that its engines work on
    training     all nodes take each step together; a lost node loses the steps since the last checkpoint
    driver       its node fails like others; it is submitted again and goes on from what is committed

    goodput      time of the plan, without failures and checkpoints, over the simulated time
    lost         node-hours of work that was done again
    waited       node-hours of nodes that were up and had nothing to do: starts, missing nodes, the longest shard
"""

import argparse
import heapq
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from spin_ray.config.load import load_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.cluster import Cluster, devices_of
from spin_ray.planning.generation_cost import ENGINE_START_S
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import MOMENTS, WORKERS_START_S
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.plan import Given, read_shape, read_work
from spin_ray.planning.run_cost import plan_run, ranks_of
from spin_ray.planning.scaling import on_all_gpus
from spin_ray.planning.work import Work, pair_packs
from spin_ray.runtime.workers import ELASTIC_PLACING_S

HOUR = 3600.0
GPU_MTBF_S = 54 * 24 * HOUR * 16_384 / 419
"""Seconds between failures of one GPU: 419 in 54 days on 16,384 (Llama 3, arXiv 2407.21783, section 3.3.4)."""
SLOW_NODES, SLOWDOWN = 0.005, 1.10
"""Share of slow nodes, and their time over others' (MegaScale, arXiv 2402.15627; cited from memory)."""
STEP_NOISE = 0.02
"""Standard deviation of a node's time of a step over its mean: an assumption."""
NOTICE_S = 20.0
"""Longest time until Ray notices a lost node (``runtime.workers.ELASTIC_PLACING_S`` counts on it)."""
STORAGE = 2 * GB
"""Bytes/s at which one node writes or reads a checkpoint: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The nodes, and what happens to them."""

    nodes: int
    mtbf_s: float = 8 * GPU_MTBF_S
    """Mean seconds between failures of one node."""
    replaced_s: float = 600.0
    """Mean seconds until a lost node is back, or an autoscaler's new one is there."""
    slow: float = SLOW_NODES
    noise: float = STEP_NOISE


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The settings of a recipe that decide what a failure costs."""

    checkpoint_every_steps: int
    max_failures: int
    generation_failures: int
    lease_timeout_s: float
    resize_interval_s: float
    least_nodes: int
    """Nodes of ``train.min_workers``; all without it."""
    checkpoint_s: float
    engine_start_s: float

    @classmethod
    def of(cls, config: SpinConfig, shape: ModelShape, nodes: int) -> "Rules":
        train = config.train
        per_node = train.workers / nodes
        checkpoint = 4 * (1 + MOMENTS[str(train.optimizer.name)]) * shape.parameters
        return cls(
            checkpoint_every_steps=train.checkpoint_every_steps,
            max_failures=train.max_failures,
            generation_failures=config.generation.max_failures,
            lease_timeout_s=config.storage.lease_timeout_s,
            resize_interval_s=train.resize_interval_s,
            least_nodes=ceil(train.min_workers / per_node) if train.min_workers else nodes,
            checkpoint_s=checkpoint / nodes / STORAGE,
            engine_start_s=ENGINE_START_S["eager" if config.generation.engine.enforce_eager else "compiled"],
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    shards: int
    shard_s: float
    engines: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """Steps of all nodes together. Scoring and evaluation are one step each, as nothing is committed before its end."""

    steps: int
    step_s: float
    start_s: float = WORKERS_START_S
    """Start of the workers; scoring goes on with those of training."""


Stage = Generation | Training


@dataclass(kw_only=True)
class Told:
    """What a simulated run came to, in seconds; of nodes together where it says so."""

    seconds: float = 0.0
    ideal: float = 0.0
    lost: float = 0.0
    """Of nodes together."""
    waited: float = 0.0
    """Of nodes together."""
    saving: float = 0.0
    failures: int = 0
    submissions: int = 1

    @property
    def goodput(self) -> float:
        return self.ideal / self.seconds


DRIVER = -1
"""Number of the driver's node, which has no engine and no worker."""


@dataclass
class World:
    """Nodes that fail and come back, and a queue of what happens next."""

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
        """Moves on to the next event; nodes that fail or come back are already noted."""
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
    """Runs the stages one after another."""
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
    """Waits until the driver runs again: its lease must be stale, and its node there."""
    told.submissions += 1
    world.after(rules.lease_timeout_s, "lease")
    stale = False
    while not (stale and DRIVER in world.up):
        what, _ = world.next()
        stale = stale or what == "lease"


def _generate(world: World, stage: Generation, rules: Rules, told: Told) -> None:
    """Gives shards to engines until all are committed; ``turn`` makes void what a lost engine had planned."""
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
    """Takes steps in stretches that end with a checkpoint; a lost node undoes the stretch."""
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
    """Waits for all nodes, or for ``ELASTIC_PLACING_S`` and then for as many as the recipe wants at least."""
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
    """Returns the mean over steps of the slowest node's time: noise makes it grow with the group."""
    slow = max(world.slowness[node] for node in group)
    return slow * (1 + world.fleet.noise * float(world.rng.normal(0, 1, (64, len(group))).max(axis=1).mean()))


# A recipe's stages


def stages_of(config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work) -> list[Stage]:
    """Returns the plan's stages, with their times cut into shards and steps."""
    devices = devices_of(config, cluster)
    ranks = ranks_of(config, shape, devices)
    start_s = Rules.of(config, shape, cluster.nodes).engine_start_s
    stages: list[Stage] = []
    for number, phase in enumerate(plan_run(config, shape, devices, work)):
        steps = pair_packs(config, work, number, ranks.mesh.data_ranks).steps
        once: list[Stage] = []
        for stage in phase.stages:
            if stage.name == "generation":
                rows = work.rows if phase.last != "last iterate" else work.heldout_rows
                shards = max(1, ceil(rows / config.generation.shard_rows))
                rounds = ceil(shards / config.generation.replicas)
                shard_s = (stage.seconds - start_s) / rounds
                once.append(Generation(shards=shards, shard_s=shard_s, engines=config.generation.replicas))
            elif stage.name == "training":
                taken = steps * config.at(min(number, config.iterations - 1)).epochs
                once.append(Training(steps=taken, step_s=(stage.seconds - WORKERS_START_S) / taken))
            elif stage.name == "evaluation":
                once.append(Training(steps=1, step_s=stage.seconds - WORKERS_START_S))
            else:
                once.append(Training(steps=1, step_s=stage.seconds, start_s=0.0))
        stages += once * phase.count
    return stages


@dataclass(frozen=True, kw_only=True)
class Setting:
    model: str
    nodes: int
    batch: int
    rows: int = 50_000
    change: str = "as it is"
    mtbf: str = "Llama 3"
    replaced_s: float = 600.0
    checkpoint_every_steps: int = 200
    shard_rows: int | None = None
    elastic: bool = False


MTBF_OF_NODE_S = {"Llama 3": 8 * GPU_MTBF_S, "ten times as often": 0.8 * GPU_MTBF_S, "spot, 24 h": 24 * HOUR}
"""Mean seconds between failures of a node of 8 GPUs. The second is a young cluster, the third one of spot machines."""
LLAMA_70B = ModelShape(
    layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256, tied=False
)
RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "zephyr_7b.yaml"
RESULTS = Path(__file__).resolve().parent / "results"


def settings() -> Iterator[Setting]:
    """Yields the sizes, and around one of them each rule on its own."""
    for model, sizes in (("7B", (1, 2, 4, 8, 16, 32, 64)), ("70B", (4, 8, 16, 32, 64))):
        for nodes in sizes:
            for mtbf in MTBF_OF_NODE_S:
                yield Setting(model=model, nodes=nodes, batch=max(64, 64 * nodes), mtbf=mtbf)
    base = Setting(model="70B", nodes=16, batch=1024, rows=500_000, mtbf="spot, 24 h")
    for every in (10, 20, 50, 100, 200, 400):
        yield replace(base, change="checkpoints", checkpoint_every_steps=every)
    for replaced_s in (60.0, 600.0, 3600.0):
        for elastic in (False, True):
            yield replace(base, change="replacement", replaced_s=replaced_s, elastic=elastic, checkpoint_every_steps=50)
    for rows in (64, 256, 1024, 4096):
        yield replace(base, model="7B", change="shards", shard_rows=rows)


def run(setting: Setting, runs: int) -> dict[str, Any]:
    """Returns the means over seeds."""
    config = load_config(RECIPE, {"train.checkpoint_every_steps": str(setting.checkpoint_every_steps)})
    shape = read_shape(config) if setting.model == "7B" else LLAMA_70B
    engine = {} if setting.model == "7B" else {"tensor_parallel_size": 4}
    generation = config.generation.model_copy(
        update={
            "engine": config.generation.engine.model_copy(update=engine),
            "resources": config.generation.resources.model_copy(update={"gpus": 4 if engine else 1}),
            **({"shard_rows": setting.shard_rows} if setting.shard_rows else {}),
        }
    )
    train = config.train.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"generation": generation, "train": train})
    cluster = Cluster(nodes=setting.nodes, gpu="H100")
    work = read_work(config, Given(rows=setting.rows, prompt_tokens=130, response_tokens=256))
    config = on_all_gpus(config, cluster, setting.batch).settle_sizes(rows=work.rows)
    if setting.elastic:
        least = config.train.workers * 3 // 4
        config = config.model_copy(update={"train": config.train.model_copy(update={"min_workers": least})})
    rules = Rules.of(config, shape, setting.nodes)
    fleet = Fleet(nodes=setting.nodes, mtbf_s=MTBF_OF_NODE_S[setting.mtbf], replaced_s=setting.replaced_s)
    stages = stages_of(config, shape, cluster, work)
    told = [simulate(stages, fleet, rules, seed) for seed in range(runs)]

    def mean(value: Callable[[Told], float]) -> float:
        return statistics.fmean(map(value, told))

    return asdict(setting) | {
        "shard_rows": config.generation.shard_rows,
        "hours": round(mean(lambda it: it.seconds / HOUR), 3),
        "goodput": round(mean(lambda it: it.goodput), 4),
        "lost_node_hours": round(mean(lambda it: it.lost / HOUR), 3),
        "waited_node_hours": round(mean(lambda it: it.waited / HOUR), 3),
        "checkpoint_s": round(rules.checkpoint_s, 1),
        "failures": round(mean(lambda it: it.failures), 2),
        "submissions": round(mean(lambda it: it.submissions), 2),
    }


COLUMNS = {
    "as it is": ("model", "nodes", "batch", "mtbf"),
    "checkpoints": ("checkpoint_every_steps", "checkpoint_s"),
    "replacement": ("replaced_s", "elastic"),
    "shards": ("shard_rows",),
}
MEASURES = ("hours", "goodput", "lost_node_hours", "waited_node_hours", "failures", "submissions")


def tables(rows: list[dict[str, Any]]) -> str:
    parts = []
    for change, columns in COLUMNS.items():
        names = (*columns, *MEASURES)
        lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
        mine = [row for row in rows if row["change"] == change]
        lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in mine]
        parts.append(f"**{change}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = [run(setting, options.runs) for setting in settings()]
    print(tables(rows))
    if options.write:
        (RESULTS / "simulation.json").write_text(json.dumps({"runs": options.runs, "rows": rows}, indent=1) + "\n")
        head = f"By `python benchmarks/simulation.py --runs {options.runs} --write`: simulated, not measured."
        (RESULTS / "simulation.md").write_text(f"# Simulated runs\n\n{head}\n\n{tables(rows)}\n")


if __name__ == "__main__":
    main()
