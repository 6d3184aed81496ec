"""Imports of a user's objects, tried on a worker before anything runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from spin_ray.errors import ConfigError, StageError, last_line, user_error_in
from spin_ray.learner.import_path import import_object
from spin_ray.runtime.placement import in_the_cluster


def check_imports(paths: Iterable[tuple[str, str]], limit_s: float) -> None:
    """Imports objects on a worker. Without Ray, this process is the worker.

    Args:
        paths: setting and import path of each.
        limit_s: ``generation.start_timeout_s``.

    Raises:
        ConfigError: a worker cannot import one.
        StageError: the worker died, or took longer than ``limit_s``.
    """
    if not ray.is_initialized():
        return
    for setting, path in paths:
        try_on_a_worker(_import, (path, setting), f"{setting} {path}", "import it", limit_s)


def try_on_a_worker(
    function: Callable[..., None], arguments: tuple[Any, ...], what: str, to_do: str, limit_s: float
) -> None:
    """Calls a function that imports a user's object in a Ray task.

    Args:
        what: setting and path, for errors.
        to_do: what the worker does, for errors.

    Raises:
        UserError: the function raised it.
        StageError: as ``check_imports`` says.
    """
    running = ray.remote(function).options(num_cpus=0).remote(*arguments)
    ended, _ = ray.wait([running], timeout=limit_s)
    if not ended:
        ray.cancel(running, force=True)
        raise StageError(
            f"{what}: waited {limit_s:.0f} s for a worker to {to_do} (generation.start_timeout_s); {in_the_cluster()}; "
            "see what its module does when it is imported, then run the command again"
        )
    try:
        with raised_there(what):
            ray.get(running, timeout=limit_s)
    except ConfigError as error:
        said, cure = f"on the workers, {error}", "or give it to the job by --working-dir and --runtime-env-json"
        if "cannot be imported" not in said:
            raise ConfigError(f"{said}; install there what is installed here") from error
        raise ConfigError(f"{said}, {cure} (docs/data.md)") from error


@contextmanager
def raised_there(what: str) -> Iterator[None]:
    """Raises a worker's UserError as itself, and any other of Ray's errors as a StageError about ``what``."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if there := user_error_in(error):
            raise there from error
        raise StageError(f"{what}: {last_line(error)}; run the command again") from error


def _import(path: str, setting: str) -> None:
    try:
        import_object(path, setting, ())
    except ConfigError as error:
        # Other errors may come from a module that looks for a GPU: this task has none.
        if error.__cause__ is None or isinstance(error.__cause__, ImportError):
            raise
