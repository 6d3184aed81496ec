"""How many rows of each form become prompts in a second, and does the driver's memory stay flat?

The prompts stage on an embedded Ray: files read, rows checked, rendered and tokenised, parts committed. The same
conversations are written in every form.

    python benchmarks/forms.py [--rows 100000] [--forms messages,sharegpt]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.forms import BY_NAME
from spin_ray.loop.stages import prompts
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.connect import connect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--forms", default=",".join(BY_NAME))
    options = parser.parse_args()
    config = SpinConfig.model_validate(
        {"model": {"path": resolve("embedded:tiny-llama")}, "data": {"train": "one of each form"}}
    )
    connect(config)
    with tempfile.TemporaryDirectory() as folder:
        warm = write_rows(Path(folder) / "warm.jsonl", "messages", 1000)
        prepare(config, warm, Path(folder) / "warm")
        for form in options.forms.split(","):
            source = write_rows(Path(folder) / f"{form}.jsonl", form, options.rows)
            before = psutil.Process().memory_info().rss
            seconds = prepare(config, source, Path(folder) / form)
            grown = psutil.Process().memory_info().rss - before
            print(
                json.dumps({"form": form, "rows_s": round(options.rows / seconds), "grown_mib": grown >> 20}),
                flush=True,
            )


def write_rows(path: Path, form: str, rows: int) -> Path:
    """Writes the form's example with a number of its own in each row."""
    example = json.dumps(BY_NAME[form].example)
    with path.open("w") as file:
        file.writelines(example.replace("2", str(number)) + "\n" for number in range(rows))
    return path


def prepare(config: SpinConfig, source: Path, folder: Path) -> float:
    run = RunDir(Storage(folder))
    started = time.perf_counter()
    prompts.run(run, config, run.prompts, str(source), config.model.path, None)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
