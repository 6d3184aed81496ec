"""Does SPIN make a model better than the same compute spent on more SFT? The runs of the experiment; hours of CPU.

    python benchmarks/quality/run.py --data ../shared/data --split dev     # the search, on rows of train
    python benchmarks/quality/run.py --data ../shared/data --split test    # the comparison
    python benchmarks/quality/analyse.py                                   # tables, plots, intervals
    python benchmarks/quality/run.py --setting smoke --split test          # do the parts work together? minutes

One JSON for each arm and seed in benchmarks/results/quality/SETTING/SPLIT, written when the arm is finished; an arm
whose JSON is there is skipped, one that was interrupted goes on from its run folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from arms import ARMS, SEARCH, SETTINGS, SFT, WARM_UP, Arm, Setting, recipe_of, split_files

from spin_ray.embedded import resolve
from spin_ray.preflight import versions
from spin_ray.run_dir import RunDir, iterate_name, read_json_lines
from spin_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
SEEDED = (SFT, f"{SFT}_low_rate", "spin")
"""Arms that every seed runs (and the warm-up, which all need); the others run the first seed only."""


def plan(split: str, seeds: list[int]) -> list[tuple[Arm, int]]:
    """(arm, seed) in the order they are run: a seed's warm-up comes first."""
    if split == "dev":
        return [(arm, seeds[0]) for arm in [*ARMS, *SEARCH]]
    return [(arm, seed) for seed in seeds for arm in ARMS if seed == seeds[0] or arm.name in (WARM_UP, *SEEDED)]


def run_arm(setting: Setting, arm: Arm, seed: int, files: dict[str, str], runs: Path, result: Path) -> None:
    """Trains (or goes on), measures every iterate, writes the JSON."""
    folder = runs / f"seed-{seed}" / arm.name
    start = None if arm.from_base else str(runs / f"seed-{seed}" / WARM_UP / iterate_name(1) / "model")
    recipe = recipe_of(setting, arm, files, start, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe_file = folder.with_suffix(".yaml")
    recipe_file.write_text(yaml.safe_dump(recipe))
    _call("-m", "spin_ray.cli", "run", str(recipe_file), "--out", str(folder))
    run = RunDir(Storage(folder))
    iterates = [_iterate(run, number) for number in range(recipe["iterations"] + 1)]
    result.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "arm": arm.name, "seed": seed, "setting": setting.name, "recipe": recipe, "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "iterates": iterates,
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", dir=result.parent, delete=False) as file:
        file.write(json.dumps(content))
    Path(file.name).rename(result)


def _iterate(run: RunDir, number: int) -> dict[str, Any]:
    """Measures, costs since θ_0, and the run's own evaluation of one iterate."""
    name = iterate_name(number)
    model = run.storage.path(run.model(number).path)
    if number == 0 and not run.model(0).is_committed:
        model = Path(run.description()["start_model"])
    measured = run.storage.path(f"{name}/measured.json")
    if not measured.exists():
        measured.parent.mkdir(parents=True, exist_ok=True)
        attempt = measured.with_suffix(".tmp")
        script = str(Path(__file__).with_name("measure.py"))
        _call(script, "--run", str(run.storage.root), "--model", str(model), "--out", str(attempt))
        attempt.rename(measured)
    logs = [read_json_lines(run.storage, f"{iterate_name(i)}/train_log.jsonl") for i in range(1, number + 1)]
    evaluation = json.loads(run.storage.read(run.eval_path(number)))
    return {
        "iterate": number,
        "train_tokens": sum(line["tokens"] for log in logs for line in log),
        "seconds": _seconds(run, number),
        "steps": sum(map(len, logs)),
        "evaluation": evaluation,
        **json.loads(measured.read_text()),
    }


def _seconds(run: RunDir, number: int) -> float:
    """Wall time that making θ_number from θ_0 took: generation, pairs, scores and training, not the evaluations.

    Held-out and training prompts are answered by one stage; a half of it counts, more than the held-out rows' share.
    """
    total = 0.0
    for event in run.events():
        if event["event"] not in ("commit", "failure"):
            continue
        names = [name for name in event["stage"].split(" + ") if "heldout" not in name and "evaluation" not in name]
        for name in names:
            folder = name.partition("/")[0]
            if folder == "start" or (folder.startswith("iter_") and int(folder[5:]) < number):
                total += event["seconds"] / len(event["stage"].split(" + "))
    return total


def _call(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="word_problems")
    parser.add_argument("--split", choices=["dev", "test"], required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=None, help="only these (and what they need must be there)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    train, test = (Path(resolve(name)) for name in (setting.train, setting.test))
    train, test = (path if path.is_absolute() else options.data / path for path in (train, test))
    runs = options.runs.absolute() / setting.name / options.split
    files = split_files(setting, train, test, options.split, runs / "data")
    failed: list[str] = []
    for arm, seed in plan(options.split, options.seeds):
        result = options.results / setting.name / options.split / f"{arm.name}.seed-{seed}.json"
        if result.exists() or (options.arms and arm.name not in options.arms):
            continue
        print(f"{time.strftime('%H:%M:%S')} {setting.name} {options.split}: {arm.name}, seed {seed}", flush=True)
        try:
            run_arm(setting, arm, seed, files, runs, result)
        except subprocess.CalledProcessError as error:  # the other arms are worth their hours all the same
            failed.append(f"{arm.name}, seed {seed} (exit code {error.returncode})")
    if failed:
        sys.exit(f"not finished: {'; '.join(failed)}; the same command goes on with them")


if __name__ == "__main__":
    main()
