"""Does SPIN make a model better than the same compute spent on more SFT? Runs the experiment: hours of CPU.

    python benchmarks/experiments/quality/run.py --data data               # all arms
    python benchmarks/experiments/quality/analyse.py                       # tables so far
    python benchmarks/experiments/quality/run.py --setting gsm8k           # smaller
    python benchmarks/experiments/quality/run.py --setting replies         # small talk
    python benchmarks/experiments/quality/run.py --setting smoke           # do the parts work together? minutes

Each arm and seed has a JSON in benchmarks/results/quality/SETTING, written after every iterate. A finished arm is
skipped; an interrupted one continues from its run folder.
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

import pyarrow.compute as pc
import yaml
from arms import (
    ARMS,
    BUDGETS,
    COOLER_ITERATES,
    SFT,
    WARM_UP,
    Arm,
    Recipe,
    Run,
    Setting,
    arms_of,
    is_finished,
    iterations_of,
    numbered,
    plateau,
    recipe_of,
    split_files,
)
from replies import ARMS as ARMS_OF_REPLIES
from replies import SETTINGS

from spin_ray.inputs.check import versions
from spin_ray.inputs.embedded import resolve
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "quality"


class NotYet(Exception):
    """Error: the iterate that an arm starts from is not there."""


WHERE_TO_GET = (
    "--data names a folder of JSONL with messages and answer. gsm8k is github.com/openai/grade-school-math; "
    "word_problems is MAWPS and ASDiv-A as github.com/arkilpatel/SVAMP trains on them, equations infix, one row of "
    "each question template"
)


class Experiment:
    def __init__(self, setting: Setting, data: Path, runs: Path, results: Path, device: str = "cpu") -> None:
        self.setting, self.runs, self.results = setting, runs / setting.name, results / setting.name
        self.device = device
        train, test = (Path(resolve(name)) for name in (setting.train, setting.test))
        train, test = (path if path.is_absolute() else data / path for path in (train, test))
        missing = [str(path) for path in (train, test) if not path.is_file()]
        if missing:
            sys.exit(f"{', '.join(missing)}: not there; {WHERE_TO_GET}")
        self.files = split_files(setting, train, test, self.runs / "data")

    def result(self, arm: Arm, seed: int) -> Path:
        return self.results / f"{arm.name}.seed-{seed}.json"

    def finish(self, arm: Arm, seed: int, furthest: int | None = None) -> None:
        """Trains and measures an arm's missing iterates; writes its JSON after each.

        Args:
            furthest: stop at this iterate, although the arm has more.
        """
        result = self.result(arm, seed)
        if result.exists() and is_finished(self.setting, arm, json.loads(result.read_text())):
            return
        recipe = recipe_of(self.setting, arm, self.files, self.start_model(arm, seed), seed)
        before = self.spent_before(arm, seed)
        measured: list[dict[str, Any]] = []
        # θ_0 is the warm-up's; only self-reinforcement has one of its own.
        for number in range(0 if "sft" in recipe else 1, recipe["iterations"] + 1):
            _say(f"{arm.name}, seed {seed}: iterate {number} of {recipe['iterations']}")
            self.train(arm, seed, recipe, max(number, 1))
            run = RunDir(Storage(self.folder(arm, seed)))
            answered = run.storage.exists(f"{iterate_name(number)}/measured_test.json")
            iterate = self.iterate(run, number, recipe, only_logp=arm.name == WARM_UP and not answered)
            measured.append(iterate | {name: iterate[name] + cost for name, cost in before.items()})
            content = self._content(arm, seed, recipe, measured)
            done = number == recipe["iterations"]
            # An epoch past the plateau only shows that the one before was enough.
            done = done or (arm.name == WARM_UP and plateau(content) < number)
            _write(result, content | {"complete": done})
            if done or number == furthest:
                return

    def train(self, arm: Arm, seed: int, recipe: Recipe, iterations: int) -> None:
        folder = self.folder(arm, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        rates = recipe["train"]["learning_rate"]
        shorter = (_on_gpu(recipe) if self.device == "cuda" else recipe) | {"iterations": iterations}
        if isinstance(rates, list):
            shorter["train"] = shorter["train"] | {"learning_rate": rates[:iterations]}
        recipe_file = folder.with_name(f"{folder.name}.yaml")
        recipe_file.write_text(yaml.safe_dump(shorter))
        _call("-m", "spin_ray", "run", str(recipe_file), "--out", str(folder))

    def earlier(self, arm: Arm, seed: int) -> tuple[Arm, int, dict[str, Any]]:
        """Returns arm, seed and measures of the iterate that ``arm`` starts from: θ_0, or one of continued SFT.

        Raises:
            NotYet: it has not been made.
        """
        name, of_seed = (SFT, seed) if arm.after_sft else (WARM_UP, 0)
        source = next(each for each in arms_of(self.setting) if each.name == name)
        result = self.result(source, of_seed)
        content = json.loads(result.read_text()) if result.exists() else {"iterates": [], "complete": False}
        if arm.after_sft:
            number = min(arm.after_sft, iterations_of(self.setting, source))
        else:
            number = plateau(content) if content["complete"] else None
        found = numbered(content, number)
        if found is None:
            raise NotYet(
                f"{result}: does not have the iterate that {arm.name} starts from; run the arm {source.name} first, "
                f"with --seeds {of_seed}"
            )
        return source, of_seed, found

    def start_model(self, arm: Arm, seed: int) -> str | None:
        """Returns the folder of the model that an arm starts from, made again if missing; None: the base model."""
        if arm.from_base:
            return None
        source, of_seed, iterate = self.earlier(arm, seed)
        number = iterate["iterate"]
        return str(_model(self.run_with(source, of_seed, number), number))

    def run_with(self, arm: Arm, seed: int, number: int) -> RunDir:
        run = RunDir(Storage(self.folder(arm, seed)))
        if not run.model(number).is_committed:
            recipe = recipe_of(self.setting, arm, self.files, self.start_model(arm, seed), seed)
            self.train(arm, seed, recipe, number)
        return run

    def spent_before(self, arm: Arm, seed: int) -> dict[str, float]:
        if not arm.after_sft:
            return {}
        _, _, iterate = self.earlier(arm, seed)
        return {budget: iterate[budget] for budget in BUDGETS}

    def measure_cooler(self) -> None:
        """Adds answers of θ_0, and of ``COOLER_ITERATES`` at cooler temperatures, which no arm waits for."""
        for arm in [arm for arm in ARMS if arm.name in COOLER_ITERATES]:
            result = self.result(arm, 0)
            if not result.exists():
                continue
            content = json.loads(result.read_text())
            number = COOLER_ITERATES[arm.name] or plateau(content)
            iterate = numbered(content, number)
            if iterate is None:
                continue
            wanted = [("dev", 1.0), ("test", 1.0), *(("test", temperature) for temperature in self.setting.cooler)]
            missing = [each for each in wanted if "sampled" not in iterate.get(_key(*each), {})]
            if not missing:
                continue
            _say(f"{arm.name}: further answers of iterate {number}")
            run = self.run_with(arm, 0, number)
            recipe = recipe_of(self.setting, arm, self.files, self.start_model(arm, 0), 0)
            for split, temperature in missing:
                measured = self._measure(run, number, recipe, split, only_logp=False, temperature=temperature)
                iterate[_key(split, temperature)] = measured[split]
                _write(result, content)

    def measure_start(self, arm: Arm) -> None:
        result = self.result(arm, 0)
        content = json.loads(result.read_text())
        iterate = numbered(content, plateau(content))
        assert iterate is not None
        if "test" not in iterate:
            run, recipe = self.run_with(arm, 0, iterate["iterate"]), content["recipe"]
            for split in ("dev", "test"):
                iterate |= self._measure(run, iterate["iterate"], recipe, split, only_logp=False)
            _write(result, content)

    def folder(self, arm: Arm, seed: int) -> Path:
        return self.runs / f"seed-{seed}" / arm.name

    def iterate(self, run: RunDir, number: int, recipe: Recipe, only_logp: bool = False) -> dict[str, Any]:
        """Returns measures, costs since θ_0, and the run's own evaluation of an iterate.

        Args:
            only_logp: measure log p(y) of dev rows alone.
        """
        measures = self._measure(run, number, recipe, "dev", only_logp)
        if not only_logp:
            measures |= self._measure(run, number, recipe, "test", only_logp)
        logs = [run.train_log(iterate_name(i)) for i in range(1, number + 1)]
        evaluation = run.evaluation(number) or {}
        return {
            "iterate": number, "steps": sum(map(len, logs)), **_cost(run, number, logs),
            "log": [_rounded(line) for line in (logs[-1] if logs else [])],
            "evaluation": {key: value for key, value in evaluation.items() if key != "made_from"},
            **measures,
        }  # fmt: skip

    def _measure(
        self, run: RunDir, number: int, recipe: Recipe, split: str, only_logp: bool, temperature: float = 1.0
    ) -> dict[str, Any]:
        """Returns measure.py's result for a split; computed once, in its own process."""
        target = run.storage.path(
            f"{iterate_name(number)}/{'logp' if only_logp else 'measured'}_{_key(split, temperature)}.json"
        )
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            attempt = target.with_suffix(".tmp")
            longest = 0 if only_logp else recipe["generation"]["sampling"]["max_tokens"]
            replies = bool(self.setting.temperatures and longest)
            how = (
                ["--device", self.device, "--temperatures", *map(str, self.setting.temperatures)]
                if replies
                else ["--extractor", self.setting.extractor, "--temperature", str(temperature)]
            )
            _call(
                str(Path(__file__).with_name("measure_replies.py" if replies else "measure.py")),
                "--model", str(_model(run, number)), "--rows", f"{split}={self.files[split]}",
                "--longest", str(longest), "--threads", str(recipe["train"]["resources"]["cpus"]), *how,
                "--out", str(attempt),
            )  # fmt: skip
            attempt.rename(target)
        return json.loads(target.read_text())

    def _content(self, arm: Arm, seed: int, recipe: Recipe, iterates: list[dict[str, Any]]) -> Run:
        text = json.dumps(recipe)
        for role, path in self.files.items():
            text = text.replace(path, f"{role}.jsonl")
        text = text.replace(str(self.runs), "RUNS")
        return {
            "arm": arm.name, "why": arm.why, "is_spin": arm.is_spin, "seed": seed, "setting": self.setting.name,
            "recipe": json.loads(text), "versions": versions(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "iterates": iterates,
        }  # fmt: skip


def _on_gpu(recipe: Recipe) -> Recipe:
    """Returns the recipe for one card, which generation and training take in turn."""
    one = {"cpus": 1, "gpus": 1}
    generation, train = recipe["generation"], recipe["train"]
    engine = {name: value for name, value in generation["engine"].items() if name != "cpu_kv_cache_gib"}
    return recipe | {
        "generation": generation | {"resources": one, "engine": engine},
        "train": train | {"resources": one, "precision": "bf16"},
    }


def _key(split: str, temperature: float) -> str:
    return split if temperature == 1 else f"{split}_at_{temperature:g}"


def _model(run: RunDir, number: int) -> Path:
    if number == 0 and not run.model(0).is_committed:
        return Path(run.description()["start_model"])
    return run.storage.path(run.model(number).path)


def _cost(run: RunDir, number: int, logs: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Returns costs since θ_0.

    ``train_tokens`` go forward and backward. ``compute`` adds a third of the tokens of generation and reference scores,
    which go forward only. ``seconds`` is wall time.
    """
    train_tokens = sum(line["tokens"] for log in logs for line in log)
    forward = 0.0
    for iteration in range(number):
        if run.reference(iteration).is_committed:
            forward += sum(line["tokens"] for line in logs[iteration])
        if run.generations(iteration).is_committed:
            prompts = {
                name: len(ids)
                for artefact in (run.questions, run.prompts)
                if artefact.is_committed
                for table in artefact.tables()
                for name, ids in zip(table["prompt_id"].to_pylist(), table["prompt_ids"], strict=True)
            }
            for table in run.generations(iteration).tables():
                forward += pc.sum(pc.list_value_length(table["token_ids"])).as_py() or 0
                forward += sum(prompts[name] for name in table["prompt_id"].to_pylist())
    return {"train_tokens": train_tokens, "compute": train_tokens + forward / 3, "seconds": _seconds(run, number)}


def _seconds(run: RunDir, number: int) -> float:
    """Returns wall time from θ_0 to θ_number without evaluations.

    One stage answers held-out and training prompts; half of it counts, more than the held-out rows' share.
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
    return round(total, 1)


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in line.items()}


def _write(path: Path, content: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(content, separators=(",", ":")) + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).rename(path)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _call(*arguments: str) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env=environment)


def with_seeds(seeds: list[int], arms: list[Arm]) -> list[tuple[int, Arm]]:
    """Returns what is to run, in its order. An arm has the seeds from 0 to below its number of seeds.

    Raises:
        SystemExit: no arm has any of the seeds.
    """
    found = [(seed, arm) for seed in seeds for arm in arms if seed < arm.seeds]
    if not found:
        sys.exit(f"--seeds {' '.join(map(str, seeds))}: no arm has them; the most is {max(a.seeds for a in arms) - 1}")
    return found


_NAMES = list(dict.fromkeys(arm.name for arm in (*ARMS, *ARMS_OF_REPLIES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="word_problems")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the data files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=_NAMES, help="only these, in this order")
    parser.add_argument("--furthest", type=int, metavar="N", help="go no further than iterate N of each arm")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: one card")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    experiment = Experiment(setting, options.data, options.runs.absolute(), options.results, options.device)
    by_name = {arm.name: arm for arm in arms_of(setting)}
    if unknown := set(options.arms or ()) - by_name.keys():
        sys.exit(f"--arms: {', '.join(sorted(unknown))}: not of the setting {setting.name}")
    asked = [by_name[name] for name in options.arms] if options.arms else arms_of(setting)
    failed: list[str] = []
    for seed, arm in with_seeds(options.seeds, asked):
        # One that fails is named at the end: the others are worth their hours all the same.
        try:
            experiment.finish(arm, seed, options.furthest)
            if arm.name == WARM_UP and setting.temperatures:
                experiment.measure_start(arm)
        except (subprocess.CalledProcessError, NotYet) as error:
            failed.append(f"{arm.name}, seed {seed} ({error})")
    if not setting.temperatures:
        experiment.measure_cooler()
    if failed:
        sys.exit(f"not finished: {'; '.join(failed)}; the same command goes on with them")


if __name__ == "__main__":
    main()
