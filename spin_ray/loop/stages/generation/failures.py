"""Errors of failed engines, told to the driver by a file of the run.

The driver does not see what other processes log, and an engine on a GPU takes its process along.
"""

from collections.abc import Iterable
from contextlib import suppress

from spin_ray.errors import last_line
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.storage import ATTEMPTS


def tell(target: Artefact, error: Exception) -> None:
    """Writes an engine's error, unless the storage fails too."""
    with suppress(Exception):
        target.storage.replace(_path(target), last_line(error).encode())


def take(targets: Iterable[Artefact]) -> str:
    """Returns and removes what was told; empty if nothing was, or if the storage fails."""
    told = ""
    for target in targets:
        with suppress(Exception):
            if (found := target.storage.find(_path(target))) is not None:
                told = found.decode(errors="replace")
                target.storage.delete(_path(target))
    return told


def _path(target: Artefact) -> str:
    return f"{ATTEMPTS}/{target.path}/failure.txt"
