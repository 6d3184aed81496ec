"""Objects of the user's own, named by an import path ``package.module:name``."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from spin_ray.errors import ConfigError


def import_object(path: str, setting: str, names: Iterable[str | None]) -> Any:
    """Returns the object that ``path`` names. Example: ``import_object("my_pkg.mine:loss", "objective.loss", LOSSES)``.

    Args:
        setting: the setting that holds ``path``, for the message of an error.
        names: the names that the setting takes instead of a path, likewise.

    Raises:
        ConfigError: ``path`` is no import path, its module cannot be imported, or the module has no such object.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        known = ", ".join(filter(None, names))
        raise ConfigError(f"{setting}: {path!r} is unknown; use {known}, or an import path such as my_pkg.mine:name")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f"{setting}: {path} cannot be imported ({error}); install the module on every machine of the run"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{setting}: module {module} has no {name}") from error
