"""An iterate as a folder to pass on: the committed model, checked, and a model card that says how it was made."""

import shutil
from pathlib import Path

from spin_ray.errors import ConfigError, RunDirError, first_line
from spin_ray.report.history import find_iterate
from spin_ray.report.model_card import model_card
from spin_ray.report.redaction import hide_in_text
from spin_ray.run_dir.artefact import CARD
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import MANIFEST

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
    (folder / CARD).write_text(model_card(run, number), encoding="utf-8")
    return str(folder)


def _upload(run: RunDir, iterate: int, repository: str) -> str:
    """To a model repository of a Hugging Face hub, made if it is not there (private); credentials are the hub's own."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=run.storage.path(run.model(iterate).path),
            ignore_patterns=[MANIFEST, CARD],
            commit_message=f"{run.storage.name}, {iterate_name(iterate)}",
        )
        card = model_card(run, iterate).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id=repository)
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        raise ConfigError(f"{HUB}{repository}: cannot be written ({hide_in_text(first_line(error))})") from error
    return f"{HUB}{repository}"
