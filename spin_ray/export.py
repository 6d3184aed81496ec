"""An iterate as a folder to pass on: the committed model, and a model card that says how it was made.

The card is written here and not into ``RUN/iter_*/model``: that folder is committed with digests before the iterate has
been evaluated, and an evaluation that changed the model's digest would invalidate itself.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from spin_ray.config import SpinConfig
from spin_ray.errors import ConfigError, RunDirError, first_line
from spin_ray.history import find_iterate
from spin_ray.measures import MEASURES
from spin_ray.redaction import hide, hide_in_text
from spin_ray.run_dir import MANIFEST, RunDir, iterate_name

HUB = "hub:"


def export(run: RunDir, iterate: str, target: str) -> str:
    """Copies an iterate (``2``, ``iter_001``, ``sft``, ``latest``) with its card to a folder or to ``hub:OWNER/NAME``.

    Every file is checked against its digest first. Returns where it is.

    Raises:
        UserError: there is no such iterate, the folder is not empty, or the hub refuses.
    """
    number = find_iterate(run, iterate)
    artefact = run.model(number)
    if number == 0 and not artefact.is_committed:
        raise RunDirError(f"{run.storage.root}: θ_0 is the start model itself, there is nothing of the run to export")
    files = artefact.verify().files
    if target.startswith(HUB):
        return _upload(run, number, target.removeprefix(HUB))
    folder = Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; choose another --to")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.storage.path(f"{artefact.path}/{name}"), folder / name)
    (folder / "README.md").write_text(model_card(run, number), encoding="utf-8")
    return str(folder)


def model_card(run: RunDir, iterate: int) -> str:
    """README.md in the Hugging Face form: metadata with evaluation results, then what a reader must know."""
    config, description, name = run.config(), run.description(), iterate_name(iterate)
    path = run.eval_path(iterate)
    evaluation = json.loads(run.storage.read(path)) if run.storage.exists(path) else {}
    results = [(measure, value) for measure in MEASURES if (value := measure.of(evaluation)) is not None]
    base, data = hide_in_text(config.model.path), hide_in_text(config.data.train)
    metadata: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "spin_ray"],
        "model-index": [
            {
                "name": f"{run.storage.name}/{name}",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": hide_in_text(config.data.heldout or ""), "type": "held-out rows"},
                        "metrics": [
                            {"type": measure.key, "name": measure.title, "value": round(value, 6)}
                            for measure, value in results
                        ],
                    }
                ],
            }
        ],
    }
    if not results:
        del metadata["model-index"]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {run.storage.name}, {name}", ""]
    lines += [_how(config, iterate, base, data), ""]
    lines += ["## Evaluation", "", _results(evaluation, results), ""]
    lines += ["## Inputs and versions", ""]
    lines += [f"- SHA-256 of {key}: `{value or 'none'}`" for key, value in description["inputs"].items()]
    lines += [f"- {', '.join(f'{package} {number}' for package, number in description['versions'].items())}", ""]
    recipe = yaml.safe_dump(hide(config.model_dump(mode="json", exclude_defaults=True)), sort_keys=False)
    lines += ["## Recipe", "", "    " + recipe.strip().replace("\n", "\n    "), ""]
    return "\n".join(lines)


def _how(config: SpinConfig, iterate: int, base: str, data: str) -> str:
    warm_up = f"{config.sft.epochs} epoch(s) of supervised fine-tuning" if config.sft else ""
    spin = f"{iterate} iteration(s) of SPIN (self-play fine-tuning, arXiv 2401.01335)" if iterate else ""
    steps = " and ".join(step for step in (warm_up, spin) if step)
    return (
        f"Made from `{base}` by {steps} on `{data}` with spin_ray: the model learns to tell people's responses from "
        "those of the iterate before it. It has been aligned with nothing but these data: it copies what is wrong in "
        "them, and has not been tested for safety."
    )


def _results(evaluation: dict[str, Any], results: list[Any]) -> str:
    if not results:
        return "It has not been evaluated."
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


def _upload(run: RunDir, iterate: int, repository: str) -> str:
    """To a model repository of a Hugging Face hub, made if it is not there (private); credentials are the hub's own."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=run.storage.path(run.model(iterate).path),
            ignore_patterns=[MANIFEST],
            commit_message=f"{run.storage.name}, {iterate_name(iterate)}",
        )
        card = model_card(run, iterate).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repository)
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        raise ConfigError(f"{HUB}{repository}: cannot be written ({hide_in_text(first_line(error))})") from error
    return f"{HUB}{repository}"
