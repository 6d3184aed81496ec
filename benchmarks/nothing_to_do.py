"""How long does a run take that has nothing left to do?

A real run over many prompts, of which an iteration plays 64 (a tiny random model), then the same command again and
again. Such a run never starts Ray, so the whole command is timed, the start of Python with it:

    python benchmarks/nothing_to_do.py [--rows 1000000] [--runs 5]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import at_most, record

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = Path(folder) / "rows.jsonl", Path(folder) / "recipe.yaml"
        with rows.open("w") as file:
            for number in range(options.rows):
                row = {"prompt": f"What is {number} plus {number * 7}?", "response": f"{number * 8}"}
                file.write(json.dumps(row) + "\n")
        recipe.write_text(RECIPE.format(rows=rows))
        first = command(recipe, Path(folder) / "run")
        print(f"the run itself: {first:.0f} s", flush=True)
        again = [command(recipe, Path(folder) / "run") for _ in range(options.runs)]
    note = f"{options.rows} prompts, seconds of the whole command"
    record([at_most("9 nothing left to do, seconds", again, 5.0, note)])


def command(recipe: Path, out: Path) -> float:
    """Seconds of ``spin-ray run``."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "spin_ray.cli", "run", str(recipe), "--out", str(out)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
