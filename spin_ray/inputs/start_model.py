"""The model that a run started from, found again on a machine that lacks its folder."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import RunDirError, UserError
from spin_ray.inputs.hub import fetch_model
from spin_ray.inputs.merged_start import find_model
from spin_ray.inputs.model_folder import ModelFolder, is_hub_name, name_on_hub, open_committed, open_unchanged
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir

_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class StartModel:
    """Place to find a run's start model again, for ``ModelFolder.source``."""

    run: RunDir

    def local_folder(self, *, weights: bool = True) -> Path:
        return start_folder(self.run, weights=weights)


def start_folder(run: RunDir, *, weights: bool = True) -> Path:
    """Returns the folder of the model that a run started from.

    Where the driver's folder is missing, ``model.path`` is found again as a start of the run does, from the hub in the
    same commit, and compared by digest. Without ``weights``, the hub is asked for the other files alone.

    Raises:
        RunDirError: the model is not on this machine, nor found again.
    """
    folder, model = Path(run.description()["start_model"]), run.config().model
    if folder.is_dir():
        return folder
    pinned = _pinned(model, folder)
    try:
        if not weights and is_hub_name(pinned.path):
            return fetch_model(name_on_hub(pinned.path, pinned.revision), "model.path", weights=False)
        found = find_model(pinned)
        if weights:
            _open(run, found)
    except UserError as error:
        digest = run.description()["inputs"]["model"]
        raise RunDirError(
            f"{run.storage.root}: needs the model that it started from, {model.path} (digest {digest[:16]}…), whose "
            f"folder {folder} is not on this machine; copy it there, or make it available again: {error}"
        ) from error
    return found


def _pinned(model: ModelConfig, folder: Path) -> ModelConfig:
    """Returns ``model`` in the commit of the hub that ``folder``, of the client's cache, holds."""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) and is_hub_name(model.path):
        return model.model_copy(update={"revision": folder.name})
    return model


def open_initial(run: RunDir) -> ModelFolder:
    """Opens θ_0, the frozen model below a run's adapters, from a local folder.

    Raises:
        RunDirError: it is not found, or a file is missing or has changed.
        ModelError: the folder must not be loaded.
    """
    artefact = run.whole_model(0)
    if not artefact.is_committed:
        return replace(_open(run, start_folder(run)), source=StartModel(run))
    return open_committed(artefact, iterate_name(0), trust_remote_code=run.config().model.trust_remote_code)


def _open(run: RunDir, folder: Path) -> ModelFolder:
    opened = open_unchanged(folder, iterate_name(0), trust_remote_code=run.config().model.trust_remote_code)
    if opened.digest != run.description()["inputs"]["model"]:
        raise RunDirError(f"{folder}: is not the model that this run started from; restore it")
    return opened
