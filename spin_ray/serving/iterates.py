"""The iterates of a run that may serve: which there are, and opening one only if its bytes are what was committed."""

from dataclasses import dataclass
from pathlib import Path

from spin_ray.errors import RunDirError
from spin_ray.inputs.model_folder import open_model
from spin_ray.run_dir.names import LATEST, age, api_name, is_iterate, iterate_number
from spin_ray.run_dir.run_dir import RunDir

ALL = "all"


@dataclass(frozen=True, slots=True)
class Iterate:
    """A checked model folder. Example: ``Iterate("iter-0", Path("RUN/iter_000/model"), "5f0c…")``."""

    name: str
    folder: Path
    digest: str
    """Over all its files; the header of every answer says it."""


def wanted(run: RunDir, models: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Names of the iterates that should serve now, oldest first, and the one that ``latest`` should mean.

    ``models`` are names, ``latest`` and ``all``. Only what was published counts: RUN/LATEST and what came before it.
    """
    published = run.latest()
    newest = iterate_number(published) if published else 0
    names = {name for name in models if is_iterate(name) and age(name) <= newest}
    if ALL in models:
        names |= {api_name(number) for number in range(newest + 1)}
    latest = api_name(newest) if LATEST in models or ALL in models else None
    return sorted(names | ({latest} if latest else set()), key=age), latest


def open_iterate(run: RunDir, name: str) -> Iterate:
    """The model folder of ``name``, every file read and compared with what was committed.

    Raises:
        RunDirError: a file is missing or differs from its digest.
        ModelError: the folder is not one that may be loaded.
    """
    number = age(name)
    trusted = run.config().model.trust_remote_code
    artefact = run.model(number)
    if number > 0 or artefact.is_committed:
        artefact.verify()
        folder = open_model(run.storage.path(artefact.path), name, trust_remote_code=trusted)
        return Iterate(name, folder.path, folder.digest)
    description = run.description()
    folder = open_model(description["start_model"], name, trust_remote_code=trusted)
    if folder.digest != description["inputs"]["model"]:
        raise RunDirError(f"{folder.path}: is not the model that this run started from; restore it")
    return Iterate(name, folder.path, folder.digest)
