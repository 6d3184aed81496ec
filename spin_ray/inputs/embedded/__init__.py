"""Models and data that need no hub, named ``embedded:NAME`` in recipes.

An asset is made once, from an installed package or by computation, in ``$SPIN_RAY_CACHE/embedded/NAME-vVERSION``
(default cache: ``~/.cache/spin-ray``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spin_ray.errors import ConfigError
from spin_ray.inputs.embedded import data, models
from spin_ray.run_dir.cache import cache_root, filling

SCHEME = "embedded:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    version: int
    """Part of the folder's name. Raise it when ``make`` changes, or old caches serve old bytes."""
    make: Callable[[Path], None]
    file: str = ""
    """File that ``resolve`` returns; empty for the folder."""


def _jsonl(name: str, version: int, rows: Callable[[], list[data.Row]]) -> Asset:
    file = f"{name}.jsonl"
    return Asset(version=version, make=lambda folder: data.write_jsonl(folder / file, rows()), file=file)


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(version=1, make=models.make_smollm2),
    "tiny-llama": Asset(version=1, make=models.make_tiny_llama),
    "arithmetic-train": _jsonl("arithmetic-train", 1, partial(data.arithmetic_rows, "train")),
    "arithmetic-heldout": _jsonl("arithmetic-heldout", 1, partial(data.arithmetic_rows, "heldout")),
    "chitchat-train": _jsonl("chitchat-train", 1, partial(data.chitchat_rows, "train")),
    "chitchat-heldout": _jsonl("chitchat-heldout", 1, partial(data.chitchat_rows, "heldout")),
    "replies-train": _jsonl("replies-train", 2, partial(data.reply_rows, "train")),
    "replies-heldout": _jsonl("replies-heldout", 2, partial(data.reply_rows, "heldout")),
}


def resolve(uri: str) -> str:
    """Returns the local path of ``embedded:NAME``, made if missing; other strings unchanged.

    Raises:
        ConfigError: the name is unknown, a package is missing, or the cache cannot be written.
    """
    if not uri.startswith(SCHEME):
        return uri
    name = uri.removeprefix(SCHEME)
    asset = ASSETS.get(name)
    if asset is None:
        raise ConfigError(f"{uri!r} names no embedded asset; known names: {', '.join(sorted(ASSETS))}")
    folder = cache_root() / "embedded" / f"{name}-v{asset.version}"
    try:
        if not folder.is_dir():
            with filling(folder) as attempt:
                if attempt is not None:
                    asset.make(attempt)
    except OSError as error:
        raise ConfigError(
            f"cannot make {uri} in {folder.parent}: {error}; set SPIN_RAY_CACHE to a writable folder with 300 MB free"
        ) from error
    return str(folder / asset.file)
