"""What does an iteration cost that computes next to nothing?

Smoke runs (a tiny random model, 128 prompts) in turn: of this checkout and, if given, of another one, whose virtual
environment may be this one's. The seconds of one iteration's stages are starts, exports and commits:

    python benchmarks/fixed_overhead.py [--before CHECKOUT] [--pairs 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from harness import HERE, at_most, record

ITERATE = "iter_000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    checkouts = [HERE.parent, *([options.before] if options.before else [])]
    measured: list[list[dict[str, float]]] = [[] for _ in checkouts]
    for _ in range(options.pairs):
        for checkout, found in zip(checkouts, measured, strict=True):
            found.append(stages(checkout))
            print(json.dumps({"checkout": str(checkout), **found[-1]}), flush=True)
    for name in measured[0][0]:
        print(
            f"{name}: {' against '.join(f'{statistics.median(run[name] for run in runs):.1f} s' for runs in measured)}"
        )
    if options.before:
        ratios = [sum(now.values()) / sum(then.values()) for now, then in zip(*measured, strict=True)]
        record([at_most("10 fixed cost of an iteration, share of what it was first", ratios, 0.5)])


def stages(checkout: Path) -> dict[str, float]:
    """Seconds of each stage of the first iteration of a smoke run."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "spin_ray.cli", "run", "jobs/recipes/smoke.yaml", "--out", folder, "--iterations=1"],
            cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seconds: dict[str, float] = defaultdict(float)
        for line in (Path(folder) / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            iterate, _, stage = event["stage"].partition(" ")[0].partition("/")
            if event["event"] == "commit" and iterate == ITERATE:
                seconds[{"heldout_samples": "generation"}.get(stage, stage)] += round(event["seconds"], 1)
        return dict(seconds)


if __name__ == "__main__":
    main()
