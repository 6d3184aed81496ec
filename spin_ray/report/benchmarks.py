"""Public benchmarks of an iterate, measured by lm-eval.

Results go to ``benchmarks`` in ``eval.json``. A later result of a task replaces the earlier one.
"""

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.errors import ConfigError, StageError, UserError, first_line, last_line, memory_advice, user_error_in
from spin_ray.inputs.rendering import read_template
from spin_ray.inputs.start_model import start_folder
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.report import harness_warnings
from spin_ray.report.conditions import differing, shared_conditions
from spin_ray.report.endpoint import Unanswered, card_of, unreachable
from spin_ray.report.harness import measure
from spin_ray.report.harness_request import Backend, Benchmark, Request
from spin_ray.report.history import find_iterate, model_path
from spin_ray.report.model_card import write_card
from spin_ray.report.redaction import hide_in_text
from spin_ray.report.whole_model import write_whole_model
from spin_ray.run_dir.names import api_name, iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import folder_digest
from spin_ray.runtime.actors import task_options
from spin_ray.runtime.connect import connect
from spin_ray.runtime.placement import in_the_cluster
from spin_ray.runtime.waiting import wait_for_a_task

logger = logging.getLogger(__name__)

PRESETS: dict[str, tuple[Benchmark, ...]] = {
    # Open LLM Leaderboard, version 1: table 1 of the SPIN paper, which quotes the mean of the six.
    "paper": (
        Benchmark("arc_challenge", 25, "acc_norm"), Benchmark("truthfulqa_mc2", 0, "acc"),
        Benchmark("winogrande", 5, "acc"), Benchmark("gsm8k", 5, "exact_match/strict-match"),
        Benchmark("hellaswag", 10, "acc_norm"), Benchmark("mmlu", 5, "acc"),
    ),
    # Open LLM Leaderboard, version 2; lm-eval has it as the group "leaderboard".
    "leaderboard-v2": (
        Benchmark("leaderboard_ifeval"), Benchmark("leaderboard_bbh"), Benchmark("leaderboard_math_hard"),
        Benchmark("leaderboard_gpqa"), Benchmark("leaderboard_musr"), Benchmark("leaderboard_mmlu_pro"),
    ),
}  # fmt: skip
_USE_LESS: dict[Backend, str] = {
    "hf": "lower --max-length or train.workers",
    "vllm": "lower --max-length, generation.engine.gpu_memory_utilization or cpu_kv_cache_gib, "
    "generation.engine.max_num_seqs, or generation.replicas",
}
_CURE = "the score holds these rows too; for cut prompts give fewer examples (--tasks TASK:N) or a longer --max-length"
MEANS = {f"mean of {name}": preset for name, preset in PRESETS.items() if all(it.metric for it in preset)}


def parse_benchmarks(words: Sequence[str]) -> tuple[Benchmark, ...]:
    """Reads ``--tasks``, e.g. a preset and a task with 8 examples: ``["paper", "triviaqa:8"]``.

    Raises:
        ConfigError: a number of examples is not whole, or a task is asked for with two of them.
    """
    found: list[Benchmark] = []
    for word in words:
        name, colon, shots = word.partition(":")
        if colon and not shots.isdigit():
            raise ConfigError(f"--tasks {word}: the number of examples after the colon must be a whole number")
        found += PRESETS.get(word, (Benchmark(name, int(shots) if colon else None),))
    by_task: dict[str, Benchmark] = {}
    for benchmark in found:
        earlier = by_task.setdefault(benchmark.task, benchmark)
        if earlier.shots != benchmark.shots:
            raise ConfigError(
                f"--tasks: {benchmark.task} with {_examples(earlier.shots)} and with {_examples(benchmark.shots)}; "
                "eval.json keeps one result of a task, so choose one"
            )
    return tuple(by_task.values())


def _examples(shots: int | None) -> str:
    return "its own number of examples" if shots is None else f"{shots} examples"


def request_for(config: SpinConfig, iterate: int, model: str, **asked: Any) -> Request:
    """Returns the request; ``asked`` are the command line's options."""
    if asked.get("endpoint"):  # an endpoint refuses longer questions
        asked["max_length"] = asked.get("max_length") or config.model.max_length
    engine = config.resolve_dtype(config.generation.engine)
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
    """Adds results for θ_iterate to its ``eval.json`` as they come; returns all results there.

    Raises:
        UserError: lm-eval is missing or does not know a task, or the run's chat template cannot be read.
        StageError: the evaluation failed. Earlier results are kept.
    """
    request = replace(request, variables=TemplateVariables(config.model.chat_template_kwargs, run_dir.date()))
    if (file := config.model.chat_template) and (request.chat or Path(file).is_file()):
        request = replace(request, chat_template=read_template(file))
    results: dict[str, Any] = {}
    with run_dir.stage(f"{iterate_name(iterate)}/benchmarks") as counted:
        counted["tasks"] = 0
        for found in _measure(run_dir, iterate, request, config):
            for warning in harness_warnings.sentences(found.values()):
                logger.warning("%s, %s; %s", iterate_name(iterate), warning, _CURE)  # no event: it goes with the score
            results = _keep(run_dir, iterate, found)
            counted["tasks"] += len(found)
    return results


def _measure(run_dir: RunDir, iterate: int, request: Request, config: SpinConfig) -> Iterable[dict[str, Any]]:
    if request.endpoint:
        return [_measure_at_endpoint(run_dir, iterate, request)]
    return _measure_on_ray(run_dir, iterate, request, config)


def _keep(run_dir: RunDir, iterate: int, found: dict[str, Any]) -> dict[str, Any]:
    """Adds results to eval.json, beside those that other processes add meanwhile; returns all."""

    def added(evaluation: dict[str, Any] | None) -> dict[str, Any]:
        evaluation = evaluation or {"iterate": iterate_name(iterate)}
        before = evaluation.get("benchmarks", {}).items()
        results = {task: result for task, result in before if task not in MEANS} | found
        return evaluation | {"benchmarks": results | averages(results)}

    results = run_dir.update_evaluation(iterate, added)["benchmarks"]
    write_card(run_dir, iterate)
    return results


def run_all(
    run_dir: RunDir, iterates: Sequence[str], tasks: Sequence[str], include: str | None, console: Console, **asked: Any
) -> dict[str, dict[str, Any]]:
    """Measures each iterate and prints its results; returns them by iterate.

    Finds all iterates before it measures any. Raises as ``run``.
    """
    config, found = run_dir.config(), {}
    asked |= {"benchmarks": parse_benchmarks(tasks), "include": task_folder(include)}
    numbers = [find_iterate(run_dir, wanted) for wanted in iterates]
    for number in numbers:
        request = request_for(config, number, str(model_path(run_dir, number)), **asked)
        found[iterate_name(number)] = run(run_dir, config, number, request)
        if not console.quiet:
            print_results(iterate_name(number), found[iterate_name(number)], console)
    return found


def averages(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the mean of each preset whose tasks all ran under the same conditions.

    Its error takes the tasks as independent.
    """
    found = {}
    for name, quoted, tasks in _complete(results):
        if not differing(tasks):
            mean = sum(value for value, _ in quoted) / len(quoted)
            error = math.hypot(*(error for _, error in quoted)) / len(quoted)
            metrics = {"mean": {"value": mean, "standard_error": error}}
            found[name] = {"metrics": metrics, "shots": None, "rows": None, "task_version": None}
            found[name] |= shared_conditions(tasks[0]) | {"warnings": harness_warnings.distinct(tasks)}
    return found


def without_mean(results: dict[str, Any]) -> Iterator[str]:
    """Yields why a preset whose tasks have all run has no mean."""
    for name, preset in MEANS.items():
        if all(benchmark.task in results for benchmark in preset):
            reasons = [reason for benchmark in preset if (reason := _why_not_quoted(benchmark, results))]
            if names := differing([results[benchmark.task] for benchmark in preset]):
                reasons.append(f"its tasks ran with different values of {', '.join(names)}")
            if reasons:
                yield f"{name}: left out, because {'; '.join(reasons)}"


def _complete(results: dict[str, Any]) -> Iterator[tuple[str, list[tuple[float, float]], list[dict[str, Any]]]]:
    """Yields (name of the mean, values with errors, results) of each preset that ran as it says."""
    for name, preset in MEANS.items():
        quoted = [metric for benchmark in preset if (metric := _quoted(benchmark, results))]
        if len(quoted) == len(preset):
            yield name, quoted, [results[benchmark.task] for benchmark in preset]


def _quoted(benchmark: Benchmark, results: dict[str, Any]) -> tuple[float, float] | None:
    """Returns (value, error); None unless the task ran with the preset's examples on all rows."""
    if _why_not_quoted(benchmark, results):
        return None
    metric = results[benchmark.task]["metrics"][benchmark.metric]
    return metric["value"], metric["standard_error"] or 0.0


def _why_not_quoted(benchmark: Benchmark, results: dict[str, Any]) -> str | None:
    result = results.get(benchmark.task)
    if result is None:
        return f"{benchmark.task} has not run"
    if benchmark.metric not in result["metrics"]:
        return f"{benchmark.task} has no {benchmark.metric}"
    if result["limit"] is not None:
        return f"{benchmark.task} ran on its first {result['limit']} rows"
    if result["shots"] != benchmark.shots:
        return f"{benchmark.task} ran with {_examples(result['shots'])}, not {benchmark.shots}"
    return None


def _measure_at_endpoint(run_dir: RunDir, iterate: int, request: Request) -> dict[str, Any]:
    endpoint = request.endpoint or ""
    if reason := unreachable(endpoint):  # lm-eval would read its data first and then retry for minutes
        raise StageError(f"{hide_in_text(endpoint)}: {hide_in_text(reason)}")
    _refuse_another_run(run_dir, iterate, request)
    try:
        return measure(request)
    except UserError:
        raise
    except Exception as error:  # errors of lm-eval, of its HTTP clients, and from unexpected answers
        kind = error.kind if isinstance(error, Unanswered) else StageError
        said = str(error) if isinstance(error, Unanswered) else f"{type(error).__name__}: {first_line(error)}"
        raise kind(f"{hide_in_text(endpoint)}: lm-eval failed on {request.name}: {hide_in_text(said)}") from error


def _refuse_another_run(run_dir: RunDir, iterate: int, request: Request) -> None:
    """Raises ConfigError if a server of spin_ray serves another model under the iterate's name."""
    endpoint, artefact = request.endpoint or "", run_dir.model(iterate)
    card = card_of(endpoint, request.name)
    if card.get("owned_by") == "spin_ray" and artefact.is_committed:
        found, expected = str(card.get("digest")), folder_digest(artefact.manifest().files)
        if found != expected:
            raise ConfigError(
                f"{hide_in_text(endpoint)}: its {request.name} is not that of {run_dir.storage.root} (digest "
                f"{found[:8]}…, not {expected[:8]}…); ask a server of this run, started after {request.name} was made"
            )


def _measure_on_ray(run_dir: RunDir, iterate: int, request: Request, config: SpinConfig) -> Iterator[dict[str, Any]]:
    import ray
    import ray.exceptions

    connect(config)
    resources = backend_resources(config, request.backend)
    section = config.generation if request.backend == "vllm" else config.train
    parts = split(request, config.generation.replicas if request.backend == "vllm" else config.train.workers)
    limit_s = max(section.start_timeout_s, config.cluster.wait_for_nodes_s)
    wait_for_a_task(resources, limit_s, f"lm-eval on {request.name}")  # the other parts may follow the first
    # max_calls=1 ends the process afterwards: vLLM and torch give no memory back.
    task = ray.remote(max_calls=1)(_measure_there).options(**task_options(resources))
    running = {task.remote(run_dir, iterate, part): part for part in parts}

    def ended() -> Iterator[tuple[Request, dict[str, Any] | Exception]]:
        while running:
            ready, _ = ray.wait(list(running), timeout=config.train.stall_timeout_s)
            if not ready:
                yield from _stuck(running, config.train.stall_timeout_s)
                return
            [first] = ready
            part = running.pop(first)
            try:
                yield part, ray.get(first)
            except ray.exceptions.RayError as error:
                yield part, user_error_in(error) or error

    yield from results_of(ended())


def _stuck(running: dict[Any, Request], waited_s: float) -> Iterator[tuple[Request, Exception]]:
    """Ends the tasks of all parts that run; yields each with its error."""
    import ray

    for task, part in running.items():
        ray.cancel(task, force=True)
        yield part, StageError(f"waited {waited_s:.0f} s (train.stall_timeout_s); {in_the_cluster()}")


def results_of(parts: Iterable[tuple[Request, dict[str, Any] | Exception]]) -> Iterator[dict[str, Any]]:
    """Yields the results of each part, then raises all failures together.

    Raises:
        UserError: the user must mend at least one part.
        StageError: parts failed for other reasons.
    """
    failures: dict[str, type[UserError | StageError]] = {}
    for part, found in parts:
        if isinstance(found, dict):
            yield found
        elif isinstance(found, UserError):
            failures[str(found)] = UserError
        else:
            tasks = ",".join(benchmark.task for benchmark in part.benchmarks)
            cause = f"{last_line(found)}{memory_advice(found, _USE_LESS[part.backend])}"
            failures[f"lm-eval failed on {part.name}, --tasks {tasks}: {cause}"] = StageError
    if failures:
        kind = UserError if UserError in failures.values() else StageError
        raise kind("; ".join(failures))


def _measure_there(run_dir: RunDir, iterate: int, request: Request) -> dict[str, Any]:
    """Measures on the Ray task's machine, which finds the start model, fetches a stored one and merges an adapter."""
    model = run_dir.model(iterate)
    if not model.is_committed:
        return measure(replace(request, model=str(start_folder(run_dir))))
    if not run_dir.is_adapter(iterate):
        return measure(replace(request, model=str(model.local_folder())))
    with tempfile.TemporaryDirectory() as merged:
        write_whole_model(run_dir, iterate, Path(merged))
        return measure(replace(request, model=merged))


def split(request: Request, workers: int) -> list[Request]:
    """Splits the benchmarks over at most ``workers`` requests, each of which loads the model."""
    parts = [request.benchmarks[start::workers] for start in range(min(workers, len(request.benchmarks)))]
    return [replace(request, benchmarks=part) for part in parts] or [request]


def backend_resources(config: SpinConfig, backend: Backend) -> ResourcesConfig:
    return config.generation.resources if backend == "vllm" else config.train.resources


def print_results(iterate: str, results: dict[str, Any], console: Console) -> None:
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
    for reason in without_mean(results):
        console.print(reason)


def task_folder(path: str | None) -> str | None:
    """Returns the absolute path.

    Raises:
        ConfigError: there is no such folder.
    """
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"--include {path}: there is no such folder")
    return str(Path(path).absolute()) if path else None
