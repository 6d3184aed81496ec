"""Objects named by an import path."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from spin_ray.errors import ConfigError


def import_object(path: str, setting: str, names: Iterable[str | None]) -> Any:
    """Returns the object that ``path`` names; errors mention ``setting`` and its ``names``.

    Raises:
        ConfigError: ``path`` is malformed, or cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        known = ", ".join(filter(None, names))
        raise ConfigError(f"{setting}: {path!r} is unknown; use {known}, or an import path such as my_pkg.mine:name")
    try:
        found = import_module(module)
    except Exception as error:  # the module's own code runs, and may raise anything
        raise ConfigError(
            f"{setting}: {path} cannot be imported ({type(error).__name__}: {error}); install the module on every "
            "machine of the run"
        ) from error
    if not hasattr(found, name):
        raise ConfigError(f"{setting}: module {module} has no {name}")
    return getattr(found, name)
