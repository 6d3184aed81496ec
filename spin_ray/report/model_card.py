"""An iterate's model card: ``README.md`` beside its weights, in the Hugging Face form.

The card has no digest, because evaluations after the commit rewrite it.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import name_of, sources_of
from spin_ray.report.measures import CONFIDENCE, MEASURES
from spin_ray.report.redaction import hide, hide_in_text
from spin_ray.run_dir.artefact import CARD
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir

HUB_DATA = "hf://datasets/"


def write_card(run: RunDir, iterate: int) -> None:
    """Writes the card beside θ_iterate, if the run made that model."""
    model = run.model(iterate)
    if not model.is_committed:
        return
    path, card = f"{model.path}/{CARD}", model_card(run, iterate).encode()
    if not run.storage.exists(path) or run.storage.read(path) != card:
        run.storage.replace(path, card)


def model_card(run: RunDir, iterate: int) -> str:
    config, description, name = run.config(), run.description(), iterate_name(iterate)
    evaluation = run.evaluation(iterate) or {}
    results = [(measure, value) for measure in MEASURES if (value := measure.of(evaluation)) is not None]
    benchmarks = evaluation.get("benchmarks", {})
    base, data = hide_in_text(config.model.path), hide_in_text(name_of(config.data.train))
    metadata: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "spin_ray"],
    }
    if hub := [source.path for source in sources_of(config.data.train) if source.path.startswith(HUB_DATA)]:
        metadata["datasets"] = ["/".join(path.removeprefix(HUB_DATA).split("/")[:2]) for path in hub]
    heldout = hide_in_text(name_of(config.data.heldout))
    ours = [(measure.key, measure.title, value) for measure, value in results]
    groups = [_result(heldout, "held-out rows", ours)] if ours else []
    for task, found in benchmarks.items():
        quoted = [(metric, metric, it["value"]) for metric, it in found["metrics"].items()]
        groups.append(_result(task, "lm-eval", quoted))
    if groups:
        metadata["model-index"] = [{"name": f"{run.storage.name}/{name}", "results": groups}]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {run.storage.name}, {name}", ""]
    lines += [_how(config, iterate, base, data), ""]
    lines += ["## Evaluation", "", _results(evaluation, results), ""]
    if benchmarks:
        lines += ["## Benchmarks (lm-eval)", "", *_benchmark_rows(benchmarks), ""]
    lines += ["## Inputs and versions", ""]
    lines += [f"- SHA-256 of {key}: `{value or 'none'}`" for key, value in description["inputs"].items()]
    lines += [f"- {', '.join(f'{package} {number}' for package, number in description['versions'].items())}", ""]
    recipe = yaml.safe_dump(hide(config.model_dump(mode="json", exclude_defaults=True)), sort_keys=False)
    lines += ["## Recipe", "", "    " + recipe.strip().replace("\n", "\n    "), ""]
    return "\n".join(lines)


def _result(dataset: str, kind: str, metrics: list[tuple[str, str, float]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": kind},
        "metrics": [{"type": key, "name": title, "value": round(value, 6)} for key, title, value in metrics],
    }


def _benchmark_rows(benchmarks: dict[str, Any]) -> Iterator[str]:
    yield "| task | examples | metric | value |"
    yield "|---|---|---|---|"
    for task, found in benchmarks.items():
        for metric, it in found["metrics"].items():
            error = f" ± {CONFIDENCE * it['standard_error']:.4f}" if it["standard_error"] else ""
            shots = "" if found["shots"] is None else found["shots"]
            yield f"| {task} | {shots} | {metric} | {it['value']:.4f}{error} |"


def _how(config: SpinConfig, iterate: int, base: str, data: str) -> str:
    warm_up = f"{config.sft.epochs} epoch(s) of supervised fine-tuning" if config.sft else ""
    spin = f"{iterate} iteration(s) of SPIN (self-play fine-tuning, arXiv 2401.01335)" if iterate else ""
    steps = " and ".join(step for step in (warm_up, spin) if step)
    return (
        f"Made from `{base}` by {steps} on `{data}` with spin_ray: the model learns to tell human responses from "
        "those of the iterate before it. It has been aligned with these data only: it copies their errors, and it has "
        "not been tested for safety."
    )


def _results(evaluation: dict[str, Any], results: list[Any]) -> str:
    if not results:
        return "The model has not been evaluated."
    lines = [
        f"{evaluation['rows']} held-out rows, one fresh sample each; ± is a 95 % interval of the mean.",
        "",
        "| measure | value | meaning |",
        "|---|---|---|",
    ]
    for measure, value in results:
        interval = measure.interval(evaluation)
        half = f" ± {(interval[1] - interval[0]) / 2:.{measure.digits}f}" if interval else ""
        lines.append(f"| {measure.title} | {value:.{measure.digits}f}{half} | {measure.meaning} |")
    return "\n".join(lines)
