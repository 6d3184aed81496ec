"""Does it run on a GPU, is it right there, and how fast is it? Eight steps, with eight minutes in all for 80 GB cards.

    python benchmarks/gpu.py                       # every step of gpu_steps/, in order
    python benchmarks/gpu.py --only step           # one step again; its rows replace this card's earlier ones
    python benchmarks/gpu.py --tiny --out FOLDER   # a rehearsal on a CPU with toy sizes; measures nothing

Each measure is written to results/gpu.json and results/gpu.md at once. A row says why a step did not run or was cut.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from gpu_steps.child import ROOT, Child, Context, module_of, run_items
from gpu_steps.rows import Measure, Results, line
from where import commit

BUDGET_S = {
    "machine": 15, "probe": 30, "attention": 40, "parity": 80, "step": 115, "trl": 60, "adapters": 55, "job": 85,
}  # fmt: skip
"""Seconds of each step with the start of its processes: eight minutes in all."""


LOG = ".gpu.log"
WORK_BYTES = 32e9


def main() -> None:
    options = parse()
    if options.child:
        context = Context(tiny=options.tiny, work=options.work)
        run_items(options.child, json.loads(options.items), context, options.reply)
        return
    if not options.tiny and (why := why_no_card()):
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=options.work or in_memory()) as folder:
        context = Context(tiny=options.tiny, work=Path(folder))
        results = Results(options.out, facts() | ({"commit": options.commit} if options.commit else {}))
        (results.folder / LOG).unlink(missing_ok=True)
        here = {"file": str(options.out.resolve() / "gpu.json"), "facts": results.facts}
        (context.work / "results.json").write_text(json.dumps(here))
        left = 0.0
        for step in options.only or BUDGET_S:
            deadline = time.monotonic() + left + options.budget_factor * BUDGET_S[step]
            run_step(step, context, results, deadline - time.monotonic())
            left = max(0.0, deadline - time.monotonic())
    rows = results.of_this_card
    missed = [row["id"] for row in rows if row["met"] is False]
    file, card = options.out / "gpu.json", results.facts["card"]
    print(f"{file}: {len(rows)} rows of {card}; targets missed: {', '.join(missed) or 'none'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU; needs --out")
    parser.add_argument("--only", action="append", choices=list(BUDGET_S), help="a step; may be given again")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md; results/ if not given")
    parser.add_argument("--work", type=Path, help="folder for models that are made (20 GB); in memory if there is room")
    parser.add_argument("--commit", help="the rows' commit, where git does not tell it")
    parser.add_argument("--budget-factor", type=float, default=1.0, help="for slower cards: times every budget")
    for hidden in ("--child", "--items"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--reply", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny and not (options.out or options.child):
        parser.error("--tiny measures nothing; give --out FOLDER, so that results/ keeps what a card has shown")
    options.out = options.out or ROOT / "benchmarks/results"
    return options


def run_step(step: str, context: Context, results: Results, budget_s: float) -> None:
    """Runs all items of a step, in as many processes as it takes, and adds their rows."""
    deadline = time.monotonic() + budget_s
    waiting = list(module_of(step).ITEMS)
    log = results.folder / LOG
    while waiting:
        if time.monotonic() >= deadline:
            results.forget(step, waiting)
            for item in waiting:
                add(results, step, item, failed(item, f"not run: the {budget_s:.0f} s of {step} were spent"))
            return
        begun: list[str] = []
        for item, message in Child(step=step, items=waiting, context=context, log=log).messages(deadline):
            if item not in begun:
                results.forget(step, [item])
                begun.append(item)
            if "row" in message:
                add(results, step, item, Measure(**message["row"]))
            if "failed" in message:
                add(results, step, item, failed(item, message["failed"]))
        waiting = waiting[len(begun) :]


def failed(item: str, why: str) -> Measure:
    return Measure(id=item, value=None, unit="failed", note=why)


def add(results: Results, step: str, item: str, measure: Measure) -> None:
    results.add(step, item, measure)
    print(line(step, measure), flush=True)


def why_no_card() -> str | None:
    """Returns in one line why nothing can be measured here, or None."""
    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a CUDA build, or rehearse with --tiny --out DIR"
        )
    try:
        torch.cuda.init()
    except Exception as error:
        return f"no usable CUDA card: {str(error).splitlines()[0]}; update the driver or rehearse with --tiny --out DIR"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {major}.{minor}; bf16 and the attention kernels need 8.0 (A100) or newer"
    return None


def in_memory() -> Path | None:
    """Returns a folder in memory, if there is room: models of 18 GB are written and read again."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > WORK_BYTES else None


def facts() -> dict[str, object]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    for package in ("torch", "transformers", "triton", "ray", "trl", "liger-kernel", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not there"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (rehearsal)"
    return {"card": card, "versions": versions, "commit": commit()}


if __name__ == "__main__":
    main()
