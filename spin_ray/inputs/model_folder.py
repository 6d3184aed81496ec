"""Model folders in Hugging Face layout, found, checked and digested."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ConfigError, ModelError, first_line
from spin_ray.run_dir.artefact import folder_entries
from spin_ray.run_dir.storage import Digest, folder_digest

_CODE_OR_PICKLE = (".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


class Source(Protocol):
    """Place to get a model from by digest."""

    def local_folder(self, *, weights: bool = True) -> Path: ...


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    digest: str
    """Digest of all files."""
    name: str
    """Name of the iterate: ``start``, ``sft``, ``iter_000``, …"""
    pad_id: int
    """Any legal token: lengths mark padding, never this id."""
    files: Mapping[str, Digest] = field(default_factory=dict)
    """Digests of the files, unless the model is an artefact of the run."""
    source: Source | None = None
    """Origin for a machine without ``path``."""

    def here(self, *, weights: bool = True) -> Path:
        """Returns the folder on this machine, fetched if need be; without ``weights`` only what a tokenizer needs."""
        return self.source.local_folder(weights=weights) if self.source else self.path


def open_model(path: str | Path, name: str, *, trust_remote_code: bool = False) -> ModelFolder:
    """Checks a model folder before any library opens it.

    Raises:
        ModelError: it is no model, or holds pickled weights or code.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{path}: no such model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json; expected a model in Hugging Face layout")
    if not trust_remote_code:
        _refuse_untrusted(folder)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: has no .safetensors weights; convert them (save_pretrained writes safetensors)")
    config = read_config(folder)
    pad = config.get("pad_token_id")
    entries = folder_entries(folder)
    return ModelFolder(
        folder,
        folder_digest(entries),
        name,
        pad if isinstance(pad, int) and pad >= 0 else 0,
        {file: Digest(entry.sha256, entry.bytes) for file, entry in entries.items()},
    )


def find_model(config: ModelConfig) -> Path:
    """Returns the folder of ``model.path``, fetched if it names a model of the hub.

    Raises:
        ModelError: there is no such model.
        ConfigError: it has fewer positions than ``model.max_length``.
    """
    folder = Path(config.path).expanduser().absolute()  # Ray workers run in other folders
    if not folder.exists():
        if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
            raise ModelError(f"model.path {config.path}: no such folder")
        folder = _download(config.path)
    limit = read_config(folder).get("max_position_embeddings")
    if isinstance(limit, int) and config.max_length > limit:
        raise ConfigError(
            f"model.max_length: {config.max_length} is more than the {limit} positions of {config.path}; lower it"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json; raises ModelError if it is missing or no JSON object."""
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"{path.parent}: has no {path.name}; expected a model in Hugging Face layout") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return content


def _refuse_untrusted(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _CODE_OR_PICKLE:
            raise ModelError(
                f"{path}: pickled weights and code can run anything when loaded; keep only safetensors, or set "
                "model.trust_remote_code if you trust the source"
            )
    for path in sorted(folder.glob("*config.json")):
        if _has_key(_read_json(path), "auto_map"):
            raise ModelError(
                f"{path}: auto_map asks for the model's own code; set model.trust_remote_code if you trust it"
            )


def _has_key(tree: Any, key: str) -> bool:
    """Searches the parsed JSON, whose text may write the key with escapes."""
    if isinstance(tree, dict):
        return key in tree or any(_has_key(value, key) for value in tree.values())
    return isinstance(tree, list) and any(_has_key(value, key) for value in tree)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelError(
            f"model.path {name}: no such folder, and the hub did not give it ({first_line(error)})"
        ) from error
