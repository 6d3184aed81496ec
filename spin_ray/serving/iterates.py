"""The iterates of a run that may serve."""

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from spin_ray.errors import ConfigError, RunDirError
from spin_ray.inputs.model_folder import Source, open_committed
from spin_ray.inputs.start_model import open_initial
from spin_ray.run_dir.names import LATEST, api_name, iterate_number, read_iterate
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import folder_digest

ALL = "all"


@dataclass(frozen=True, slots=True)
class Iterate:
    """A checked model or adapter folder."""

    name: str
    folder: Path
    digest: str
    """Digest of all files."""
    date: datetime | None = None
    """The run's date, which the chat template may write."""
    source: Source | None = None
    """Origin for a machine without ``folder``: the folder in the run, or the start model's."""
    base: "Iterate | None" = None
    """Frozen model below an adapter."""

    @property
    def engine(self) -> "Iterate":
        """The model whose engine answers: for an adapter, its base."""
        return self.base or self

    def here(self) -> Self:
        """Returns the iterate with a folder on this machine, fetched or found again if it is missing."""
        return replace(self, folder=self.source.local_folder()) if self.source else self


def wanted(run: RunDir, models: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Returns the iterates that should serve, oldest first, and the one that ``latest`` means.

    Iterates newer than RUN/LATEST are left out.
    """
    published = run.latest()
    newest = iterate_number(published) if published else 0
    numbers = {number for name in models if (number := read_iterate(name)) is not None and number <= newest}
    names = {api_name(number) for number in numbers}
    if ALL in models:
        names |= {api_name(number) for number in range(newest + 1)}
    latest = api_name(newest) if LATEST in models or ALL in models else None
    return sorted(names | ({latest} if latest else set()), key=iterate_number), latest


def check_models(run: RunDir, models: tuple[str, ...]) -> None:
    """Raises ConfigError if a name is no iterate's, or none of the iterates is published."""
    for name in models:
        if read_iterate(name) is None and name not in (LATEST, ALL):
            raise ConfigError(f"serving.models: {name!r} is none of sft, iter-0, iter-1, …, {LATEST}, {ALL}")
    if not wanted(run, models)[0]:
        raise ConfigError(f"serving.models: {run.storage.root} has published none of {', '.join(models)} yet")


def mark_of(run: RunDir, name: str) -> str | None:
    """Returns a digest that tells whether an iterate was made again; None if the run has no manifest of it now."""
    with suppress(RunDirError):
        return run.model(iterate_number(name)).manifest().digest
    return None


def open_iterate(run: RunDir, name: str) -> Iterate:
    """Opens a model or adapter folder and checks its digests.

    Raises:
        RunDirError: a file is missing or has changed.
        ModelError: the folder must not be loaded.
    """
    number = iterate_number(name)
    if number == 0:
        model = open_initial(run)
        return Iterate(name, model.path, model.digest, run.date(), model.source)
    artefact = run.model(number)
    if run.is_adapter(number):
        folder, digest = artefact.checked_folder(), folder_digest(artefact.manifest().files)
        return Iterate(name, folder, digest, run.date(), artefact, open_iterate(run, api_name(0)))
    model = open_committed(artefact, name, trust_remote_code=run.config().model.trust_remote_code)
    return Iterate(name, model.path, model.digest, run.date(), artefact)
