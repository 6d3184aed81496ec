"""Does the driver's memory grow with the number of prompts?

Prompts, generation with a null engine, and pairs, at two sizes:

    python benchmarks/driver_memory.py [--rows 20000 200000]

Prints the driver's peak resident memory after each size (each in a process of its own) and the rows per second of each
stage.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from spin_ray.config import SamplingConfig, SpinConfig
from spin_ray.embedded import resolve
from spin_ray.engine import Completion, EngineSpec
from spin_ray.resources import connect
from spin_ray.run_dir import RunDir
from spin_ray.stages import generation, pairs, prompts
from spin_ray.storage import Storage


class NullEngine:
    """Answers at once, with tokens that the seed decides."""

    def __init__(self, spec: EngineSpec) -> None:
        pass

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        return [Completion([3 + seed % 97] * 16 + [2], "stop") for seed in seeds]

    def close(self) -> None:
        pass


def measure(rows: int) -> None:
    """One size; prints a JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        with data.open("w") as file:
            for number in range(rows):
                file.write(
                    json.dumps({"prompt": f"What is {number} plus {number * 7}?", "response": f"{number * 8}"}) + "\n"
                )
        config = SpinConfig.model_validate(
            {
                "model": {"path": resolve("embedded:tiny-llama"), "max_length": 256},
                "data": {"train": str(data)},
                "generation": {"shard_rows": 2048, "sampling": {"max_tokens": 32}},
                "train": {"pack_length": 512},
                "cluster": {"local_cpus": 2},
            }
        )
        run = RunDir(Storage(Path(folder) / "run"))
        connect(config)
        baseline = peak_mib()
        line: dict[str, float] = {"rows": rows}
        spec = EngineSpec(
            model=Path(config.model.path), max_length=256, stop_token_id=2, threads=1, config=config.generation.engine
        )
        job = generation.Job(run.prompts, run.generations(0), "sft", "-")
        for name, work in {
            "prompts": lambda: prompts.run(run, config, run.prompts, str(data), config.model.path, None),
            "generation": lambda: generation.run(run, config, spec, [job], NullEngine),
            "pairs": lambda: pairs.run(run, config, 0),
        }.items():
            started = time.perf_counter()
            work()
            line[f"{name}_rows_per_s"] = round(rows / (time.perf_counter() - started))
        line |= {"driver_peak_mib": round(peak_mib()), "above_start_mib": round(peak_mib() - baseline)}
        print(json.dumps(line), flush=True)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one)
    else:
        for size in options.rows:
            subprocess.run([sys.executable, __file__, "--one", str(size)], check=True)
