"""Names, shapes and formats of a model folder's weights, by its safetensors headers."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin_ray.errors import ModelError

COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Suffixes of tokenizers, chat templates, generation config and licence."""
OTHER_LAYOUT = re.compile(r"consolidated.*|params\.json|tekken\.json|tokenizer\.model\.v\d.*")
"""Files of Mistral's own layout, which repeat those of Hugging Face beside them.

vLLM loads all safetensors of a folder without an index; ``model.safetensors`` comes last and wins.
"""
_IN_A_LAYER = re.compile(r"\.\d+\..*?(\w+)\.weight$")
_LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""
_PACKED = {"I8", "U8", "I4", "U4", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Formats of quantised weights."""
_LFS = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers loads; without ``model.safetensors`` and index, all safetensors."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if (shards := _shards(folder)) is not None:
        return [path for path in shards if path.is_file()]
    return sorted(path for path in folder.glob("*.safetensors") if not OTHER_LAYOUT.fullmatch(path.name))


def missing_shards(folder: Path) -> list[str]:
    """Returns the names of files that the index names and the folder lacks."""
    if (folder / "model.safetensors").is_file():
        return []
    return [path.name for path in _shards(folder) or () if not path.is_file()]


def _shards(folder: Path) -> list[Path] | None:
    try:
        places = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted({*places.values()})]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors; a damaged file has none."""
    return {name: tuple(entry.get("shape", ())) for name, entry in _tensors(folder)}


def layer_names(folder: Path) -> list[str]:
    """Returns the names of matrices in the numbered layers, e.g. ``q_proj``."""
    shapes = tensor_shapes(folder).items()
    return sorted({found[1] for name, shape in shapes if len(shape) == 2 and (found := _IN_A_LAYER.search(name))})


def find_packed(folder: Path) -> str | None:
    """Returns a weight matrix in a quantised format, and the format, or None."""
    for name, entry in _tensors(folder):
        if name.endswith((".weight", "_blocks")) and entry.get("dtype") in _PACKED and len(entry.get("shape", [])) > 1:
            return f"{name} is {entry['dtype']}"
    return None


def count_matrices(folder: Path) -> int | None:
    """Returns the number of weights in matrices and stacks of matrices, or None.

    None: there are none, or quantised ones, or a shard is missing.
    """
    if missing_shards(folder) or find_packed(folder):
        return None
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values() if len(shape) in (2, 3)) or None


def refuse_damaged(folder: Path) -> None:
    """Raises ModelError if a needed file is cut off, a Git LFS pointer, or a shard without an index."""
    beside = [path for path in sorted(folder.glob("*")) if path.suffix in COPIED_SUFFIXES and path.is_file()]
    for path in weight_files(folder) + beside:
        if path.stat().st_size < 1024 and path.read_bytes().startswith(_LFS):
            raise ModelError(f"{path}: is a pointer of Git LFS and not the file; fetch it by git lfs pull")
    for path in weight_files(folder):
        size, header = path.stat().st_size, _header(path)
        ends = [entry["data_offsets"][1] for entry in (header or {}).values() if "data_offsets" in entry]
        if header is None or size < _start(path) + max(ends, default=0):
            raise ModelError(f"{path}: is damaged or cut off ({size} bytes); copy it again")
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise ModelError(
            f"{folder}: has neither model.safetensors nor model.safetensors.index.json, by which transformers finds "
            "weights; copy it with the shards, or save the model again"
        )


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in weight_files(folder):
        yield from ((name, entry) for name, entry in (_header(path) or {}).items() if name != "__metadata__")


def _start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size)) if 0 < size <= _LONGEST_HEADER else None
        except ValueError:
            return None
    return header if isinstance(header, dict) else None
