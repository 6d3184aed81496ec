"""Objects named by an import path."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from spin_ray.errors import ConfigError


def import_object(path: str, setting: str, names: Iterable[str | None], *, on_workers: bool = True) -> Any:
    """Returns the object that ``path`` names; errors mention ``setting`` and its ``names``.

    Args:
        on_workers: True if workers import it, too.

    Raises:
        ConfigError: ``path`` is malformed, or cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        known = ", ".join(filter(None, names))
        raise ConfigError(f"{setting}: {path!r} is unknown; use {known}, or an import path such as my_pkg.mine:name")
    if on_workers and module == "__main__":
        raise ConfigError(
            f"{setting}: {path} is in the script or notebook itself, which no worker can import; put {name} in a "
            f"module that every machine of the run can import, e.g. my_pkg.mine:{name}"
        )
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
