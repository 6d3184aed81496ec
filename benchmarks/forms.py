"""How many rows of each form become prompts in a second, and does the driver's memory stay flat?

    python benchmarks/forms.py [--rows 100000] [--forms messages,sharegpt] [--kind parquet] [--tasks-only]

Runs the prompts stage and prints a line of JSON for each form:

- ``rows_s``: rows of the whole stage in a second of wall time;
- ``cpu_us``: CPU microseconds a row in a task of the stage (best of three passes);
- ``plain_cpu_us``: the same for ``json.loads`` and ``apply_chat_template(tokenize=True)``, once for the prompt and once
  for each whole conversation;
- ``driver_mib``: peak memory of the driver with all rows, less that with a tenth of them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from harness import peak_mib

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import DataConfig
from spin_ray.inputs.conversations import read_row
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.forms import BY_NAME
from spin_ray.inputs.prompt_rows import PromptTask
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.inputs.sources import split
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.loop.stages.prompts.slices import RenderSlice
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.connect import connect

PLAIN_ROWS, TASK_ROWS = 2_000, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--forms", default=",".join(BY_NAME))
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--tasks-only", action="store_true", help="measure CPU alone, without Ray: for busy machines")
    options = parser.parse_args()
    config = SpinConfig.model_validate(
        {"model": {"path": resolve("embedded:tiny-llama")}, "data": {"train": "one of each form"}}
    )
    task = PromptTask.of(config, config.model.path).prepared()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if not options.tasks_only:
            connect(config)
            prepare(config, write_rows(root / "warm.jsonl", "messages", options.rows), root / "warm")
        for form in options.forms.split(","):
            line: dict[str, float | str] = {"form": form}
            if not options.tasks_only:
                few = write_rows(root / f"{form}-few.{options.kind}", form, options.rows // 10)
                many = write_rows(root / f"{form}.{options.kind}", form, options.rows)
                prepare(config, few, root / f"{form}-few")
                before = peak_mib()
                line["rows_s"] = round(options.rows / prepare(config, many, root / form))
                line["driver_mib"] = round(peak_mib() - before)
            ours = task_cpu_us(task, write_rows(root / f"task.{options.kind}", form, TASK_ROWS), root / "task")
            plain = plain_cpu_us(config, write_rows(root / "plain.jsonl", form, PLAIN_ROWS))
            line |= {"cpu_us": round(ours, 1), "plain_cpu_us": round(plain, 1), "times": round(plain / ours, 1)}
            print(json.dumps(line), flush=True)


def write_rows(path: Path, form: str, rows: int) -> Path:
    example = json.dumps(BY_NAME[form].example)
    lines = (example.replace("2", str(number)) for number in range(rows))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(map(json.loads, lines))), path, row_group_size=10_000)
    else:
        with path.open("w") as file:
            file.writelines(line + "\n" for line in lines)
    return path


def prepare(config: SpinConfig, source: Path, folder: Path) -> float:
    run = RunDir(Storage(folder))
    started = time.perf_counter()
    prompts.run(run, config, config.model.path, prompts.RowsOf.training(run, config, str(source)))
    return time.perf_counter() - started


def task_cpu_us(task: PromptTask, source: Path, folder: Path) -> float:
    render = RenderSlice(Storage(folder), "prompts", task)
    pieces = [asdict(piece) | {"name": f"{number}"} for number, piece in enumerate(split([str(source)]))]
    return min(_cpu_s(lambda: list(map(render, pieces))) for _ in range(3)) / TASK_ROWS * 1e6


def plain_cpu_us(config: SpinConfig, source: Path) -> float:
    """Returns CPU microseconds a row, without finding the messages: trainers differ there."""
    tokenizer, data = load_tokenizer(config.model.path), DataConfig(train=str(source))
    rows = [read_row(json.loads(line), data).all for line in source.open()]
    lines = [json.dumps(each) for each in rows]

    def work() -> None:
        for line in lines:
            conversations = json.loads(line)
            tokenizer.apply_chat_template(conversations[0][:-1], add_generation_prompt=True, tokenize=True)
            for messages in conversations:
                tokenizer.apply_chat_template(messages, tokenize=True)

    return _cpu_s(work) / PLAIN_ROWS * 1e6


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
