"""What do failures, slow nodes and autoscaling cost a run of days on 1 to 64 nodes?

    python benchmarks/simulation.py [--runs 20] [--write]     # --write: results/simulation.{json,md}

fleet.py simulates the driver's rules with the times of ``spin-ray plan``; nothing is measured.

- goodput: the plan's time, without failures and checkpoints, over the simulated time
- lost: node-hours of work that was done again
- waited: node-hours of idle nodes that were up
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from fleet import GPU_MTBF_S, HOUR, Fleet, Generation, Rules, Stage, Told, Training, simulate
from tables import LLAMA_70B

from spin_ray.config.load import load_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.planning.cluster import Cluster, devices_of
from spin_ray.planning.learner_cost import WORKERS_START_S
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.plan import Given, read_shape, read_work
from spin_ray.planning.run_cost import plan_run, ranks_of
from spin_ray.planning.scaling import on_all_gpus
from spin_ray.planning.work import Work, epoch_packs

MTBF_OF_NODE_S = {"Llama 3": 8 * GPU_MTBF_S, "ten times as often": 0.8 * GPU_MTBF_S, "spot, 24 h": 24 * HOUR}
"""Mean seconds between failures of a node of 8 GPUs: a mature cluster, a young one, spot machines."""
RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "zephyr_7b.yaml"
RESULTS = Path(__file__).resolve().parent / "results"


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


def settings() -> Iterator[Setting]:
    """Yields all sizes, then one size with one rule changed at a time."""
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


def stages_of(config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work) -> list[Stage]:
    """Returns the plan's stages, their times cut into shards and steps."""
    devices = devices_of(config, cluster)
    ranks, algorithm = ranks_of(config, shape, devices), find_algorithm(config.algorithm)
    start_s = Rules.of(config, shape, cluster.nodes).engine_start_s
    stages: list[Stage] = []
    for number, phase in enumerate(plan_run(config, shape, devices, work, algorithm)):
        steps = epoch_packs(config, algorithm.costs(config, work, number).trained, ranks.mesh.data_ranks).steps
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


def run(setting: Setting, runs: int) -> dict[str, Any]:
    config = load_config(RECIPE, {"train.checkpoint_every_steps": str(setting.checkpoint_every_steps)})
    shape = read_shape(config) if setting.model == "7B" else ModelShape.from_config(LLAMA_70B, "Llama 70B")
    engine = {} if setting.model == "7B" else {"tensor_parallel_size": 4}
    generation = config.generation.model_copy(
        update={
            "engine": config.generation.engine.model_copy(update=engine),
            "resources": config.generation.resources.model_copy(update={"gpus": 4 if engine else 1}),
            **({"shard_rows": setting.shard_rows} if setting.shard_rows else {}),
        }
    )
    config = config.with_train(precision="bf16").model_copy(update={"generation": generation})
    cluster = Cluster(nodes=setting.nodes, gpu="H100")
    work = read_work(config, Given(rows=setting.rows, prompt_tokens=130, response_tokens=256))
    config = on_all_gpus(config, cluster, setting.batch).settle_sizes(rows=work.rows)
    if setting.elastic:
        least = config.train.workers * 3 // 4
        config = config.with_train(min_workers=least)
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
