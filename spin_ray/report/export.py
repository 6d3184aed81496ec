"""Export of an iterate's model with its card."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path

from spin_ray.config.paths import is_remote, local_path
from spin_ray.errors import ConfigError, RunDirError, first_line, writing
from spin_ray.report.card_notes import vllm_option
from spin_ray.report.history import find_iterate
from spin_ray.report.model_card import model_card
from spin_ray.report.redaction import hide_in_text
from spin_ray.report.whole_model import write_whole_model
from spin_ray.run_dir.artefact import CARD
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir, open_run
from spin_ray.run_dir.storage import MANIFEST, give_usual_modes

HUB = "hub:"


def export(run: RunDir | str | Path, iterate: str, target: str | Path) -> str:
    """Copies an iterate's checked files to a folder or ``hub:OWNER/NAME``, an adapter merged; returns the target.

    Args:
        run: a run, or its folder or store's URI.
        iterate: ``latest``, ``sft``, ``iter_000``, …

    Raises:
        UserError: no such iterate, a damaged file, a folder that is not empty or cannot be written, or the hub refuses.
    """
    run, target = run if isinstance(run, RunDir) else open_run(run), str(target)
    number = find_iterate(run, iterate)
    artefact = run.model(number)
    if number == 0 and not artefact.is_committed:
        raise RunDirError(f"{run.storage.root}: θ_0 is the start model itself; the run has nothing to export for it")
    if target.startswith(HUB) and run.is_adapter(number):
        with tempfile.TemporaryDirectory() as merged:
            write_whole_model(run, number, Path(merged))
            return _upload(run, number, Path(merged), target.removeprefix(HUB))
    if target.startswith(HUB):
        return _upload(run, number, artefact.checked_folder(), target.removeprefix(HUB))
    if is_remote(target):
        raise ConfigError(f"--to {target}: is no folder of this machine; export to one, and copy that to the store")
    folder = local_path(target)
    _write(run, number, folder)
    return str(folder)


def _write(run: RunDir, iterate: int, folder: Path) -> None:
    with writing(folder):
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty; give another folder by --to")
    artefact, merges = run.model(iterate), run.is_adapter(iterate)
    source = folder if merges else artefact.checked_folder()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        if merges:
            write_whole_model(run, iterate, folder)
        card = _card(run, iterate, source)
        with writing(folder):
            for name in () if merges else artefact.manifest().files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
            (folder / CARD).write_text(card, encoding="utf-8")
            give_usual_modes(folder)
    except BaseException:
        _empty(folder)  # as it was; a part of a model is of no use
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _card(run: RunDir, iterate: int, folder: Path) -> str:
    """Returns the card, with the options that vLLM needs to read config.json as transformers does."""
    from spin_ray.runtime.corrections import corrections  # slow: transformers

    card, config = model_card(run, iterate, merged=run.is_adapter(iterate)), run.config()
    extra, trusts = config.generation.engine.extra, config.model.trust_remote_code
    overrides = corrections(folder, extra, on_cpu=False, trust_remote_code=trusts).get("hf_overrides")
    if not overrides:
        return card
    command = f"    vllm serve FOLDER --hf-overrides {shlex.quote(json.dumps(overrides))}"
    if variables := config.model.chat_template_kwargs:
        command += f" {vllm_option(variables)}"
    return f"{card}\n## In vLLM\n\nvLLM reads config.json as transformers does if it is started so:\n\n{command}\n"


def _upload(run: RunDir, iterate: int, folder: Path, repository: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        # The card first: the hub refuses a card that it cannot read, and the weights take hours.
        card = _card(run, iterate, folder).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id=repository)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[MANIFEST, CARD],
            commit_message=f"{run.storage.name}, {iterate_name(iterate)}",
        )
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        raise ConfigError(f"{HUB}{repository}: cannot be written ({hide_in_text(first_line(error))})") from error
    return f"{HUB}{repository}"
