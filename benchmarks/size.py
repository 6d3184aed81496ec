"""What do many prompts cost: rows per second of each stage, and the driver's memory?

    python benchmarks/size.py [--rows 10000 100000 1000000]

Rates count only the rows that the last size adds to the one before: starting workers does not count.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import at_least, at_most, peak_mib, record

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import SamplingConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.connect import connect
from spin_ray.runtime.engine import Completion, EngineSpec


class NullEngine:
    """An engine that answers at once, with tokens that follow from the seed."""

    def __init__(self, spec: EngineSpec) -> None:
        pass

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], *, audited: int = 0
    ) -> list[Completion]:
        return [Completion([3 + seed % 97] * 16 + [2], "stop") for seed in seeds]

    def close(self) -> None:
        pass


def measure(rows: int) -> None:
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
        job = generation.Job(run.prompts, run.generations(0), ModelFolder(Path(config.model.path), "-", "sft", 0))
        for name, work in {
            "prompts": lambda: prompts.run(
                run, config, config.model.path, prompts.RowsOf.training(run, config, str(data))
            ),
            "generation": lambda: generation.run(run, config, spec, [job], NullEngine),
            "pairs": lambda: pairs.run(run, config, 0),
        }.items():
            started = time.perf_counter()
            work()
            line[name] = time.perf_counter() - started
        line["driver_mib"] = peak_mib() - baseline
        print(json.dumps(line), flush=True)


def tokenizer_rows_per_s() -> float:
    """Returns the rows that the tokenizer alone encodes in a second on all cores."""
    tokenizer = load_tokenizer(resolve("embedded:tiny-llama"))
    chats = [
        [{"role": "user", "content": f"What is {n} plus {n * 7}?"}, {"role": "assistant", "content": f"{n * 8}"}]
        for n in range(20_000)
    ]
    prompts = tokenizer.apply_chat_template([chat[:1] for chat in chats], tokenize=False, add_generation_prompt=True)
    texts = [*prompts, *(chat[1]["content"] for chat in chats)]
    started = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return len(chats) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one)
        return
    sizes_asked = sorted(set(options.rows))
    if len(sizes_asked) < 2:
        parser.error("--rows: give two sizes or more; rates are those of the rows that the last size adds")
    alone = [tokenizer_rows_per_s() for _ in range(3)]
    lines = []
    for size in sizes_asked:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(size)], check=True, stdout=subprocess.PIPE, text=True
        )
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps({name: round(value, 1) for name, value in lines[-1].items()}), flush=True)
    first, before, last = lines[0], *lines[-2:]
    more, sizes = last["rows"] - before["rows"], f"{before['rows']} to {last['rows']} rows"
    whole = f"{first['rows']} to {last['rows']} rows"
    stages = ("prompts", "generation", "pairs")
    seconds = {name: last[name] - before[name] for name in stages}
    found = [at_least(f"8 {name}, rows/s more rows cost", [more / seconds[name]], 20_000, sizes) for name in stages]
    alone += [tokenizer_rows_per_s() for _ in range(3)]  # before and after: the machine must not have changed meanwhile
    rates = f"{sizes}; the tokenizer's own: {' '.join(f'{rate:.0f}' for rate in alone)}"
    share = more / seconds["prompts"] / statistics.median(alone)
    found.append(at_least("8 prompts, share of the tokenizer's own rows/s", [share], 0.5, rates))
    found.append(at_most("8 driver memory, MiB more", [last["driver_mib"] - first["driver_mib"]], 200, whole))
    if len(lines) > 2:
        small = (before["rows"] - first["rows"]) / (
            sum(before[name] for name in stages) - sum(first[name] for name in stages)
        )
        found.append(
            at_most(
                "8 all three, cost of a row, times that at smaller sizes",
                [sum(seconds.values()) / more * small],
                1.1,
                sizes,
            )
        )
    record(found)


if __name__ == "__main__":
    main()
