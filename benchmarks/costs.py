"""Measures one cost a command.

python benchmarks/costs.py useful-tokens --data FILE.jsonl [--rows 2000] [--batch 24] [--pack-length 512]
python benchmarks/costs.py pack-length --data FILE.jsonl [--lengths 512 1024 2048] [--batch 24] [--pairs 5]
python benchmarks/costs.py step-profile --data FILE.jsonl [--batch 24] [--pack-length 1024] [--threads 1]
python benchmarks/costs.py nothing-to-do [--rows 1000000] [--runs 5]
python benchmarks/costs.py fixed-overhead [--before CHECKOUT] [--pairs 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from gpu_steps.sizes import table_of
from harness import (
    HERE,
    Side,
    add_training_options,
    at_most,
    pairs_of,
    prepare,
    record,
    side_command,
)

from spin_ray.learner.step import Objective, PackShape, pair_lengths, plan, train_step
from spin_ray.runtime.cpu import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (useful_tokens, pack_length, step_profile, nothing_to_do, fixed_overhead):
        command = commands.add_parser(run.__name__.replace("_", "-"), description=run.__doc__)
        command.set_defaults(run=run)
        _OPTIONS[run.__name__](command)
    options = parser.parse_args()
    options.run(options)


def useful_tokens(options: argparse.Namespace) -> None:
    """How many tokens does training compute for each token that it must: every prompt once, every response once?"""
    rows = pairs_of(options.data, options.rows)
    table = table_of(rows)
    shape = PackShape(pack_length=options.pack_length, global_batch_pairs=options.batch, pad_id=2)
    (steps,) = plan(pair_lengths([table]), shape, epochs=1, seed=0)
    computed = sum(len(shape.build(pack, table).input_ids) for step in steps for pack in step.packs)
    least = sum(len(ids) for row in rows for ids in row.values())
    note = f"{len(rows)} pairs of {options.data.name}, {options.batch} a step, packs of {options.pack_length}"
    name = f"6 tokens computed, times the least ({options.data.name.partition('.')[0]})"
    record([at_most(name, [computed / least], 1.05, note)])


def pack_length(options: argparse.Namespace) -> None:
    """How does the pack length change a step's time and peak memory? Sides take turns; nothing is recorded."""
    prepare()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pairs = Path(folder) / "pairs.json"
        pairs.write_text(json.dumps(pairs_of(options.data, options.batch * (options.pairs + 1))))
        sides = {}
        for length in options.lengths:
            of_length = argparse.Namespace(**vars(options) | {"pack_length": length})
            command = side_command("spin_ray_training", pairs, of_length, "--learning-rate", 1e-6)
            sides[length] = stack.enter_context(Side(f"packs_{length}", command, keep_freed_memory()))
        for side in sides.values():
            side.ready()
        seconds: dict[int, list[float]] = {length: [] for length in sides}
        for step in range(options.pairs + 1):  # the first warms up
            turns = {length: side.turn(step) for length, side in sides.items()}
            print(json.dumps({length: [round(turn["seconds"], 2), turn["packs"]] for length, turn in turns.items()}))
            for length, turn in turns.items():
                seconds[length] += [turn["seconds"]] if step else []
        first = seconds[options.lengths[0]]
        for length, side in sides.items():
            ratios = [mine / base for mine, base in zip(seconds[length], first, strict=True)]
            print(
                f"packs of {length}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the "
                f"time at {options.lengths[0]}, peak {side.peak_pss_mib:.0f} MiB"
            )


ROWS_OF_PROFILE = 20
FSDP_RANGES = ("FSDP::pre_forward", "FSDP::pre_backward", "FSDP::post_backward")
"""Ranges that FSDP2 marks in a profile; none lies within another."""


def step_profile(options: argparse.Namespace) -> None:
    """Where does the time of a training step go?

    One thread by default, as the profile of more threads includes waiting.
    """
    restart_with_allocator()
    prepare()

    from sides.spin_ray_training import learner
    from torch.profiler import ProfilerActivity, profile

    table = table_of(pairs_of(options.data, options.batch))
    shape = PackShape(pack_length=options.pack_length, global_batch_pairs=options.batch, pad_id=2)
    backend = learner(options.precision, options.pack_length, learning_rate=1e-6, threads=options.threads)
    ((step,),) = plan(pair_lengths([table]), shape, epochs=1, seed=0)
    # Supervised, as that needs no reference first; y′ is packed and computed all the same.
    objective = Objective(loss=None, sft_weight=1.0)
    for _ in range(2):
        train_step(backend, step, table, shape, objective, None)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train_step(backend, step, table, shape, objective, None)
    events = profiler.key_averages()
    print(events.table(sort_by="self_cpu_time_total", row_limit=ROWS_OF_PROFILE, max_name_column_width=50))
    sharding = sum(event.cpu_time_total for event in events if event.key.startswith(FSDP_RANGES))
    everything = sum(event.self_cpu_time_total for event in events)
    print(f"FSDP2's gathering and reducing: {sharding / everything:.3f} of the step")


def restart_with_allocator() -> None:
    """Restarts this script with a train worker's environment, which the loader reads only when a process starts."""
    environment = keep_freed_memory()
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


RECIPE = """
model: {{path: "embedded:tiny-llama", max_length: 128}}
data: {{train: {rows}, prompts_per_iteration: 64}}
iterations: 1
generation:
  sampling: {{max_tokens: 24}}
  resources: {{cpus: 1}}
  engine: {{enforce_eager: true, cpu_kv_cache_gib: 1}}
train: {{resources: {{cpus: 1}}, epochs: 1, global_batch_pairs: 16, pack_length: 256}}
"""


def nothing_to_do(options: argparse.Namespace) -> None:
    """How long does the command of a finished run take? Such a run never starts Ray."""
    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = Path(folder) / "rows.jsonl", Path(folder) / "recipe.yaml"
        with rows.open("w") as file:
            for number in range(options.rows):
                row = {"prompt": f"What is {number} plus {number * 7}?", "response": f"{number * 8}"}
                file.write(json.dumps(row) + "\n")
        recipe.write_text(RECIPE.format(rows=rows))
        out = Path(folder) / "run"
        print(f"the run itself: {seconds_of_run(recipe, out):.0f} s", flush=True)
        again = [seconds_of_run(recipe, out) for _ in range(options.runs)]
    note = f"{options.rows} prompts, seconds of the whole command"
    record([at_most("9 nothing left to do, seconds", again, 5.0, note)])


def seconds_of_run(recipe: Path, out: Path) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "spin_ray", "run", str(recipe), "--out", str(out)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - started


ITERATE = "iter_000"


def fixed_overhead(options: argparse.Namespace) -> None:
    """What does an iteration cost that computes next to nothing: starts, exports and commits?

    Smoke runs of this checkout and of ``--before`` take turns, with the same Python.
    """
    checkouts = [HERE.parent, *([options.before] if options.before else [])]
    measured: list[list[dict[str, float]]] = [[] for _ in checkouts]
    for _ in range(options.pairs):
        for checkout, found in zip(checkouts, measured, strict=True):
            found.append(seconds_of_stages(checkout))
            print(json.dumps({"checkout": str(checkout), **found[-1]}), flush=True)
    for name in measured[0][0]:
        medians = [f"{statistics.median(run[name] for run in runs):.1f} s" for runs in measured]
        print(f"{name}: {' against '.join(medians)}")
    if options.before:
        ratios = [sum(now.values()) / sum(then.values()) for now, then in zip(*measured, strict=True)]
        record([at_most("10 fixed cost of an iteration, share of what it was first", ratios, 0.5)])


def seconds_of_stages(checkout: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run = psutil.Popen(
            [sys.executable, "jobs/run_spin.py", "jobs/recipes/smoke.yaml", "--out", folder, "--iterations=1"],
            cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        print(json.dumps({"checkout": str(checkout), "CPU seconds": cpu_seconds(run)}), flush=True)
        if run.wait():
            raise RuntimeError(f"the run of {checkout} failed; run it by hand")
        seconds: dict[str, float] = defaultdict(float)
        for line in (Path(folder) / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            iterate, _, stage = event["stage"].partition(" ")[0].partition("/")
            if event["event"] == "commit" and iterate == ITERATE:
                seconds[{"heldout_samples": "generation"}.get(stage, stage)] += round(event["seconds"], 1)
        return dict(seconds)


def cpu_seconds(run: psutil.Popen) -> dict[str, float]:
    """Waits for a command; returns its processes' CPU seconds: ``all``, and by the name that Ray gave."""
    last: dict[tuple[int, float], tuple[str, float]] = {}
    while run.poll() is None:
        with suppress(psutil.Error):
            for process in [run, *run.children(recursive=True)]:
                with suppress(psutil.Error):
                    title = " ".join(process.cmdline()).partition("ray::")[2].partition(".")[0].strip()
                    key, spent = (process.pid, process.create_time()), sum(process.cpu_times()[:2])
                    first = last.get(key, ("", 0.0))[0]  # later titles are those of what an actor calls
                    last[key] = first or title.replace("IDLE", ""), spent
        time.sleep(0.1)
    kinds: dict[str, float] = defaultdict(float)
    for name, spent in last.values():
        kinds[name or "others"] += spent
    return {"all": round(sum(kinds.values()), 1)} | {name: round(spent, 1) for name, spent in sorted(kinds.items())}


def _of_useful_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="rows with messages, one JSON object a line")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24, help="pairs of a step")
    parser.add_argument("--pack-length", type=int, default=512)


def _of_pack_length(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])


def _of_step_profile(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser)
    parser.add_argument("--threads", type=int, default=1)


def _of_nothing_to_do(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)


def _of_fixed_overhead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=5)


_OPTIONS = {
    "useful_tokens": _of_useful_tokens, "pack_length": _of_pack_length, "step_profile": _of_step_profile,
    "nothing_to_do": _of_nothing_to_do, "fixed_overhead": _of_fixed_overhead,
}  # fmt: skip


if __name__ == "__main__":
    main()
