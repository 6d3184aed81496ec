"""What does a fault at any point of a run cost?

Stops the small run of tests/faults at many points, runs it again, and counts repeated work. With --kills-s it also
kills processes of real runs.

    python benchmarks/faults.py --points 36 --kills-s 1200 --write
"""

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tables import ROOT, put

sys.path.append(str(ROOT))

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.training import worker
from tests.support import rough_run, small_run
from tests.support.faulty_disk import FAULTS, FaultyDisk, Killed
from tests.support.small_run import STEPS, committed


def counting(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Returns a list that grows by one entry with each call of ``module.name``."""
    calls: list[None] = []
    real: Callable[..., Any] = getattr(module, name)

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return real(*arguments, **named)

    patch.setattr(module, name, called)
    return calls


def measure(config: SpinConfig, folder: Path, points: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        small_run.in_this_process(patch)
        shards, steps = counting(patch, generation, "answer"), counting(patch, worker, "train_step")
        whole = FaultyDisk()
        small_run.run(config, folder / "calm", whole)
        expected, shards_needed = committed(folder / "calm"), len(shards)
        rows = []
        for fault in FAULTS:
            recovered, most_shards, most_steps = 0, 0, 0
            chosen = sorted({round(i * (len(whole.points) - 1) / (points - 1)) for i in range(points)})
            for at in chosen:
                out = folder / fault / str(at)
                shards.clear()
                steps.clear()
                try:
                    small_run.run(config, out, FaultyDisk(at, fault))
                except (Killed, StageError):
                    small_run.run(config, out)
                recovered += committed(out) == expected
                most_shards = max(most_shards, len(shards) - shards_needed)
                most_steps = max(most_steps, len(steps) - STEPS)
            rows.append(f"| {fault} | {len(chosen)} | {recovered} | 0 | {most_shards} | {most_steps} |")
            print(rows[-1], flush=True)
    return rows


def measure_kills(folder: Path, seconds: float, seed: int) -> list[str]:
    """Returns a row for each kind of process.

    Raises:
        AssertionError: a run did not end like the undisturbed one.
    """
    undisturbed, rough = folder / "kills" / "undisturbed", folder / "kills" / "rough"
    for one in (undisturbed, rough):
        one.mkdir(parents=True)
    calm = rough_run.run_calmly(undisturbed)
    kills = rough_run.run_for(seconds, rough, calm, random.Random(seed))
    rows = []
    for kind in rough_run.KINDS:
        of = [kill for kill in kills if kill.kind == kind]
        if of:
            alone = sum(not kill.same_command for kill in of)
            most = (max(kill.shards for kill in of), max(kill.steps for kill in of))
            rows.append(f"| {kind} killed | {len(of)} | {len(of)} | {alone} | {most[0]} | {most[1]} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=36, help="of the run, for each kind of fault")
    parser.add_argument("--kills-s", type=float, default=0, help="seconds of real kills")
    parser.add_argument("--seed", type=int, default=0, help="of the kills and their moments")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
        rows = measure(small_run.make_inputs(folder), folder, arguments.points)
        dist.destroy_process_group()
        if arguments.kills_s:
            rows += measure_kills(folder, arguments.kills_s, arguments.seed)
    table = [
        "| fault | times injected | recovered | of these without help | shards lost, at most | steps lost, at most |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(table))
    if arguments.write:
        put("faults", "\n".join(table), ROOT / "docs" / "faults.md")


if __name__ == "__main__":
    main()
