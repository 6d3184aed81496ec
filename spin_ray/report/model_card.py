"""An iterate's model card: ``README.md`` beside its weights, in the Hugging Face form.

The card has no digest, because evaluations after the commit rewrite it.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import sources_of
from spin_ray.report import harness_warnings
from spin_ray.report.card_notes import notes_on_loading, terms_of
from spin_ray.report.conditions import in_words
from spin_ray.report.measures import MEASURES
from spin_ray.report.methods import how_made, public_name_of, tags_of
from spin_ray.report.redaction import hide, hide_folders, hide_in_text
from spin_ray.report.uncertainty import CONFIDENCE
from spin_ray.run_dir.artefact import CARD
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir

HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
"""The start of a URI of hub data; its group is ``OWNER/NAME`` without the revision."""


def write_card(run: RunDir, iterate: int) -> None:
    """Writes the card beside θ_iterate, if the run made that model."""
    model = run.model(iterate)
    if model.is_committed:
        run.storage.update(f"{model.path}/{CARD}", lambda _: model_card(run, iterate).encode())


def model_card(run: RunDir, iterate: int, *, merged: bool = False) -> str:
    """Returns the card.

    Args:
        merged: True for an adapter that has been merged with its base.
    """
    config, description, name = run.config(), run.description(), iterate_name(iterate)
    evaluation = run.evaluation(iterate) or {}
    results = [(measure, value) for measure in MEASURES if (value := measure.of(evaluation)) is not None]
    benchmarks = evaluation.get("benchmarks", {})
    start = Path(description["start_model"])
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags_of(config, iterate),
        **terms_of(start),
    }
    if base := _on_the_hub(config, description["start_model"]):
        metadata["base_model"] = base
    learned = (*sources_of(config.data.train), *sources_of(config.data.questions))
    if hub := [found[1] for source in learned if (found := HUB_DATA.match(source.path))]:
        metadata["datasets"] = [*dict.fromkeys(hub)]
    heldout = hide_in_text(public_name_of(config.data.heldout_from))
    ours = [(measure.key, measure.title, value) for measure, value in results]
    groups = [_result(heldout, "held-out-rows", ours)] if ours else []
    for task, found in benchmarks.items():
        if found.get("limit"):
            continue  # a trial
        quoted = [(metric, metric, it["value"]) for metric, it in found["metrics"].items()]
        groups.append(_result(task, "lm-eval", quoted))
    if groups := [group for group in groups if group["metrics"]]:
        metadata["model-index"] = [{"name": f"{run.storage.name}/{name}", "results": groups}]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {run.storage.name}, {name}", ""]
    lines += [hide_in_text(how_made(config, iterate)), ""]
    is_adapter = run.is_adapter(iterate) and not merged
    if notes := [f"- {note}" for note in notes_on_loading(run, iterate, start, is_adapter=is_adapter)]:
        lines += ["## Loading", "", *notes, ""]
    lines += ["## Evaluation", "", _results(evaluation, results), ""]
    if benchmarks:
        lines += ["## Benchmarks (lm-eval)", "", *_benchmark_rows(benchmarks), ""]
        if warnings := [f"- {it}" for it in harness_warnings.sentences(benchmarks.values())]:
            lines += [*warnings, ""]
    lines += ["## Inputs and versions", ""]
    lines += [f"- SHA-256 of {key}: `{value or 'none'}`" for key, value in description["inputs"].items()]
    lines += [f"- {', '.join(f'{package} {number}' for package, number in run.versions(iterate).items())}", ""]
    recipe = yaml.safe_dump(hide_folders(hide(config.model_dump(mode="json", exclude_defaults=True))), sort_keys=False)
    lines += ["## Recipe", "", "    " + recipe.strip().replace("\n", "\n    "), ""]
    return "\n".join(lines)


def _result(dataset: str, kind: str, metrics: list[tuple[str, str, float]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": kind},
        "metrics": [
            {"type": key, "name": title, "value": round(value, 6)}
            for key, title, value in metrics
            if math.isfinite(value)  # YAML's .nan is no number for the hub
        ],
    }


def _benchmark_rows(benchmarks: dict[str, Any]) -> Iterator[str]:
    yield "| task | examples | metric | value |"
    yield "|---|---|---|---|"
    for task, found in benchmarks.items():
        for metric, it in found["metrics"].items():
            error = f" ± {CONFIDENCE * it['standard_error']:.4f}" if it["standard_error"] else ""
            shots = "" if found["shots"] is None else found["shots"]
            yield f"| {in_words(task, found)} | {shots} | {metric} | {it['value']:.4f}{error} |"


def _on_the_hub(config: SpinConfig, start_model: str) -> str | None:
    """Returns ``OWNER/NAME`` of the start model, None for a local folder, which the hub refuses as ``base_model``.

    Relative folders may look like names of the hub.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path, name = Path(config.model.path), config.model.path.partition("@")[0]
    is_local = path.exists() or Path(start_model).parts[-2:] == path.parts
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name.count("/") == 1 and not is_local else None


def _results(evaluation: dict[str, Any], results: list[Any]) -> str:
    if not results:
        return "The model has not been evaluated."
    rows, graded = evaluation["rows"], evaluation.get("answers_graded")
    samples = evaluation.get("samples_graded", graded)
    answers = "" if samples in (None, rows) else f" (answers: {samples} samples of {graded} rows are graded)"
    lines = [
        f"{rows} held-out rows, one fresh sample each{answers}; ± is a 95 % interval of the mean.",
        "",
        "| measure | value | meaning |",
        "|---|---|---|",
    ]
    for measure, value in results:
        shown = f"{value:.{measure.digits}f} {measure.spread(evaluation)}".strip()
        lines.append(f"| {measure.title} | {shown} | {measure.meaning} |")
    return "\n".join(lines)
