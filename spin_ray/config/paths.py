"""Paths of this machine, written as paths or as ``file://`` URIs."""

import os
from pathlib import Path
from urllib.parse import unquote

from spin_ray.errors import ConfigError

_FILE = "file://"


def is_remote(name: str) -> bool:
    """Tells whether a name is the URI of a store or hub."""
    return "://" in name and not name.startswith(_FILE)


def local_path(name: str) -> Path:
    """Returns the absolute path of a name or ``file://`` URI, whose escapes (``%20``) are read if no file has them.

    Raises:
        ConfigError: a URI names another machine, or a path that is not absolute.
    """
    if not name.startswith(_FILE):
        return Path(os.path.expanduser(name)).absolute()  # Path.expanduser fails on ~NAME of nobody
    path = name.removeprefix(_FILE).removeprefix("localhost")
    if not path.startswith("/"):
        raise ConfigError(f"{name}: file:// takes an absolute path of this machine, e.g. file:///data; or give a path")
    path = f"/{path.lstrip('/')}"
    return Path(path if os.path.exists(path) else unquote(path))


def without_scheme(name: str) -> str:
    """Returns the path that a ``file://`` URI means, and any other name as it is.

    Raises:
        ValueError: as ``local_path``'s ConfigError.
    """
    try:
        return str(local_path(name)) if name.startswith(_FILE) else name
    except ConfigError as error:
        raise ValueError(str(error)) from error  # pydantic names the setting
