"""Benchmarks people quote, on any iterate, by lm-eval (EleutherAI's lm-evaluation-harness).

It runs in a Ray task with a train worker's resources (its Hugging Face or vLLM backend), or here against an
OpenAI-compatible endpoint. Task folders in YAML work without a hub. Results go to ``RUN/<iterate>/benchmarks.json``;
the same task run again takes the place of its earlier result.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from spin_ray.config import SpinConfig
from spin_ray.errors import ConfigError, StageError, UserError, last_line
from spin_ray.resources import connect
from spin_ray.run_dir import RunDir, iterate_name

Backend = Literal["hf", "vllm"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A task of lm-eval. Example: ``Benchmark("arc_challenge", 25)``."""

    task: str
    shots: int | None = None
    """Examples before each question; None: as the task says."""


PRESETS: dict[str, tuple[Benchmark, ...]] = {
    # Open LLM Leaderboard, first version: table 1 of the SPIN paper (acc_norm, mc2, acc, acc, acc_norm, acc).
    "paper": (
        Benchmark("arc_challenge", 25), Benchmark("truthfulqa_mc2", 0), Benchmark("winogrande", 5),
        Benchmark("gsm8k", 5), Benchmark("hellaswag", 10), Benchmark("mmlu", 5),
    ),
    # Its second version, which present-day models are compared by; lm-eval has it as the group "leaderboard".
    "leaderboard-v2": (
        Benchmark("leaderboard_ifeval"), Benchmark("leaderboard_bbh"), Benchmark("leaderboard_math_hard"),
        Benchmark("leaderboard_gpqa"), Benchmark("leaderboard_musr"), Benchmark("leaderboard_mmlu_pro"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What lm-eval is asked to do with one iterate."""

    model: str
    """Folder of the weights and the tokenizer."""
    name: str
    """Of the iterate; what an endpoint calls it."""
    benchmarks: tuple[Benchmark, ...]
    backend: Backend = "hf"
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1; else the weights are loaded."""
    include: str | None = None
    """Folder with further tasks in YAML."""
    limit: int | None = None
    """Only the first rows of each task: a trial, not a result."""
    chat: bool = False
    """Put questions into the chat template."""
    dtype: str = "float32"
    trust_remote_code: bool = False


def parse_benchmarks(words: Sequence[str]) -> tuple[Benchmark, ...]:
    """``["paper", "gsm8k:8", "my_task"]`` -> the preset's, gsm8k with 8 examples, my_task as it says.

    Raises:
        ConfigError: the number of examples is no number.
    """
    found: list[Benchmark] = []
    for word in words:
        name, colon, shots = word.partition(":")
        if colon and not shots.isdigit():
            raise ConfigError(f"--tasks {word}: the number of examples after the colon must be a whole number")
        found += PRESETS.get(word, (Benchmark(name, int(shots) if colon else None),))
    return tuple(found)


def run(run_dir: RunDir, config: SpinConfig, iterate: int, request: Request) -> dict[str, Any]:
    """Runs the benchmarks on θ_iterate and adds them to its ``benchmarks.json``; returns the file's content.

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
        StageError: the evaluation failed.
    """
    name = iterate_name(iterate)
    with run_dir.stage(f"{name}/benchmarks") as counted:
        found = measure(request) if request.endpoint else _measure_on_ray(request, config)
        counted["tasks"] = len(found)
    path = f"{name}/benchmarks.json"
    done = json.loads(run_dir.storage.read(path)) if run_dir.storage.exists(path) else {}
    done |= found
    run_dir.storage.replace(path, json.dumps(done, indent=1, sort_keys=True).encode())
    return done


def _measure_on_ray(request: Request, config: SpinConfig) -> dict[str, Any]:
    import ray
    import ray.exceptions

    connect(config)
    resources = config.train.resources
    task = ray.remote(measure).options(
        num_cpus=resources.cpus, num_gpus=resources.gpus, resources=resources.custom, max_retries=0
    )
    try:
        return ray.get(task.remote(request))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise StageError(f"lm-eval failed on {request.name}: {last_line(error)}") from error


def measure(request: Request) -> dict[str, Any]:
    """Every metric of every task with its standard error, the task's version and its number of rows."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("lm-eval is not installed; pip install 'spin-ray[eval]'") from error
    manager = TaskManager(include_path=request.include)
    if unknown := [it.task for it in request.benchmarks if it.task not in manager.all_tasks]:
        raise ConfigError(f"--tasks: lm-eval knows no {', '.join(unknown)}; --include names a folder with more")
    kind, arguments = _model(request)
    found: dict[str, Any] = {}
    for shots, group in groupby(sorted(request.benchmarks, key=_shots), key=_shots):
        answer = simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=[benchmark.task for benchmark in group],
            num_fewshot=None if shots < 0 else shots,
            task_manager=manager,
            limit=request.limit,
            apply_chat_template=request.chat,
            log_samples=False,
        )
        found |= dict(_results(answer, request))
    return found


def _shots(benchmark: Benchmark) -> int:
    return -1 if benchmark.shots is None else benchmark.shots


def _model(request: Request) -> tuple[str, dict[str, Any]]:
    """lm-eval's name of the backend, and its arguments."""
    if request.endpoint:
        where = {"model": request.name, "tokenizer": request.model, "tokenizer_backend": "huggingface"}
        path = "chat/completions" if request.chat else "completions"
        kind = "local-chat-completions" if request.chat else "local-completions"
        return kind, where | {"base_url": f"{request.endpoint.rstrip('/')}/{path}"}
    common = {"pretrained": request.model, "dtype": request.dtype, "trust_remote_code": request.trust_remote_code}
    if request.backend == "hf":  # lm-eval takes a GPU for granted
        import torch

        common["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return request.backend, common


def _results(answer: Any, request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
    for task, values in answer["results"].items():
        metrics: dict[str, dict[str, float | None]] = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric}/{kind}"
            metrics[name] = {"value": value, "standard_error": error if isinstance(error, int | float) else None}
        yield (
            task,
            {
                "metrics": metrics,
                "shots": answer["n-shot"].get(task),
                "rows": answer["n-samples"].get(task, {}).get("effective"),
                "task_version": answer["versions"].get(task),
                "lm_eval": version("lm-eval"),
                "backend": request.endpoint or request.backend,
                "dtype": request.dtype,
                "chat": request.chat,
                "limit": request.limit,
            },
        )


def print_results(iterate: str, results: dict[str, Any], console: Console) -> None:
    """A row for each metric that lm-eval gave."""
    table = Table(title=f"lm-eval, {iterate}")
    for name in ("task", "metric", "value", "standard error", "shots", "rows"):
        table.add_column(name, justify="right" if name in ("value", "standard error", "shots", "rows") else "left")
    for task, result in results.items():
        for metric, found in result["metrics"].items():
            error = found["standard_error"]
            shown = (f"{found['value']:.4f}", "–" if error is None else f"{error:.4f}")
            table.add_row(task, metric, *shown, str(result["shots"]), str(result["rows"]))
    console.print(table)


def task_folder(path: str | None) -> str | None:
    """Raises ConfigError if there is no such folder."""
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"--include {path}: is no folder")
    return path
