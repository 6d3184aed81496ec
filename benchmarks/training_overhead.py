"""What do Ray and bookkeeping cost in training, and how close does it come to this machine's matrix products?

    python benchmarks/training_overhead.py --data FILE.jsonl [--batch 24] [--pairs 5] [--pack-length 1024]

Compares a run's training stage with a bare PyTorch loop over the same packs, in turns, and the stage's FLOP rate with
bare products of the same shapes.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gpu_steps.sizes import table_of
from harness import (
    LOSS_TOLERANCE,
    MODEL,
    Side,
    at_least,
    pairs_of,
    prepare,
    record,
    side_command,
    training_options,
)

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import open_model
from spin_ray.loop.algorithms.base import margin_objective
from spin_ray.loop.stages.training import stage as training
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.connect import connect
from spin_ray.runtime.cpu import keep_freed_memory

STEP_TIMEOUT_S = 600


def main() -> None:
    options = training_options(__doc__).parse_args()
    prepare()
    rows = pairs_of(options.data, options.batch * (options.pairs + 1))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.json"
        file.write_text(json.dumps(rows))
        turns = Path(folder) / "turns"
        turns.mkdir()
        stage = threading.Thread(target=run_stage, args=(rows, options, folder, turns), daemon=True)
        stage.start()
        with Side("bare_loop", side_command("bare_loop", file, options), keep_freed_memory()) as bare:
            matmul_flops = bare.ready()["matmul_flops"]
            ratios, efficiencies = [], []
            for step in range(options.pairs + 1):
                alone, staged = bare.turn(step), stage_turn(turns, step, stage)
                print(json.dumps({"bare": alone, "stage": staged}), flush=True)
                assert alone["tokens"] == staged["tokens"], "both sides must train on the same tokens"
                assert abs(alone["loss"] - staged["loss"]) < LOSS_TOLERANCE[options.precision], (
                    "both sides must take the same step"
                )
                if step:
                    ratios.append(alone["seconds"] / staged["seconds"])
                    efficiencies.append(alone["flops"] / staged["seconds"] / matmul_flops)
        stage.join(timeout=STEP_TIMEOUT_S)
    note = f"steps of {options.batch} pairs of {options.data.name}, {options.precision}, 2 threads"
    rate = f"{note}; products of the same shapes: {matmul_flops / 1e9:.0f} GFLOP/s"
    record(
        [
            at_least("4 training stage, share of a bare loop's tokens/s", ratios, 0.97, note),
            at_least("11 training FLOP rate, share of matrix products alone", efficiencies, 0.45, rate),
        ]
    )


def run_stage(rows: list[dict[str, list[int]]], options: argparse.Namespace, folder: str, turns: Path) -> None:
    """Runs one SPIN iteration's training, whose steps take the rows in order and wait for their turn."""
    config = SpinConfig.model_validate(
        {
            "model": {"path": resolve(MODEL), "max_length": 256}, "data": {"train": "-"},
            "generation": {"resources": {"cpus": 2}, "sampling": {"max_tokens": 64}},
            "train": {
                "workers": 1, "resources": {"cpus": 2}, "learning_rate": 1e-6, "epochs": 1,
                "precision": options.precision, "pack_length": options.pack_length, "global_batch_pairs": options.batch,
                "optimizer": {"schedule": "constant", "warmup_fraction": 0}, "checkpoint_every_steps": 10**6,
            },
        }
    )  # fmt: skip
    connect(config)
    run = RunDir(Storage(Path(folder) / "run"))
    pairs = run.pairs(0)
    pairs.commit({part_name(0): pairs.write_part(part_name(0), table_of(rows))}, {}, {})
    training.work = in_turns(str(turns), options.batch)
    start = open_model(Path(resolve(MODEL)), "sft", trust_remote_code=False)
    training.run(run, config, 0, start, margin_objective(config, 0))


def in_turns(turns: str, batch: int) -> Any:
    """Returns the stage's worker; its steps take consecutive rows, and each starts when a file says so.

    The worker is imported where it runs, as a pickled one would not see the replaced functions.
    """

    def gated(job: Any) -> Any:
        import json
        import time
        from dataclasses import replace
        from pathlib import Path

        from spin_ray.learner.step import plan
        from spin_ray.loop.stages.training import worker

        train_step = worker.train_step

        def step_in_turn(backend: Any, step: Any, table: Any, *rest: Any) -> dict[str, float]:
            number = backend.steps_done
            while not (Path(turns) / f"go-{number}").exists():
                time.sleep(0.01)
            started = time.perf_counter()
            metrics = train_step(backend, step, table, *rest)
            spent = {"seconds": time.perf_counter() - started, "loss": metrics["loss"], "tokens": metrics["tokens"]}
            target = Path(turns) / f"done-{number}"
            target.with_suffix(".part").write_text(json.dumps(spent))
            target.with_suffix(".part").rename(target)
            return metrics

        def in_order(lengths: Any, shape: Any, *, epochs: int, **_: Any) -> Any:
            steps = []
            for start in range(0, len(lengths), batch):
                part = {name: getattr(lengths, name)[start : start + batch] for name in lengths.__slots__}
                (step,) = plan(replace(lengths, **part), shape, epochs=1, seed=0)[0]
                packs = tuple(tuple(tuple(row + start for row in tree) for tree in pack) for pack in step.packs)
                steps.append(replace(step, packs=packs))
            return [steps] * epochs

        worker.train_step, worker.plan = step_in_turn, in_order
        return worker.work(job)

    return gated


def stage_turn(turns: Path, step: int, stage: threading.Thread) -> dict[str, float]:
    """Lets the stage take one step; returns the step's metrics."""
    (turns / f"go-{step}").touch()
    deadline = time.monotonic() + STEP_TIMEOUT_S
    done = turns / f"done-{step}"
    while not done.exists():
        if time.monotonic() > deadline or not stage.is_alive():
            raise TimeoutError(f"no step {step} of the training stage within {STEP_TIMEOUT_S} s, or it ended")
        time.sleep(0.01)
    return json.loads(done.read_text())


if __name__ == "__main__":
    main()
