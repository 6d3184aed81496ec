"""Model folders in Hugging Face layout."""

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ConfigError, ModelError, RunDirError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.hub import cached_model, fetch_model
from spin_ray.learner.weights import find_packed, missing_shards, tensor_shapes, weight_files
from spin_ray.run_dir.artefact import Artefact, folder_entries
from spin_ray.run_dir.storage import Digest, folder_digest

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_CODE_OR_PICKLE = (".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


class Source(Protocol):
    """Place to fetch a model from by digest."""

    def local_folder(self, *, weights: bool = True) -> Path: ...


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    digest: str
    name: str
    """Name of the iterate: ``start``, ``sft``, ``iter_000``, …"""
    pad_id: int
    """Id of padding: any legal token, because lengths mark padding."""
    files: Mapping[str, Digest] = field(default_factory=dict)
    """Digests of files; empty from ``open_artefact``."""
    source: Source | None = None
    """Origin for a machine without ``path``."""
    base: "ModelFolder | None" = None
    """Frozen base model of an adapter."""

    def here(self, *, weights: bool = True) -> Path:
        """Returns the local folder, fetched if needed; without ``weights``, only the tokenizer's files."""
        return self.source.local_folder(weights=weights) if self.source else self.path

    @property
    def whole(self) -> "ModelFolder":
        """An adapter's base; else this model."""
        return self.base or self

    def parts_here(self) -> tuple[Path, Path | None]:
        """Returns the local folders of the whole model and of the adapter."""
        return (self.base.here(), self.here()) if self.base else (self.here(), None)


_TRUST = "set model.trust_remote_code if you trust the source"


def open_model(
    path: str | Path, name: str, *, trust_remote_code: bool = False, cure_of_code: str = _TRUST
) -> ModelFolder:
    """Checks and digests a model folder before any library opens it; arguments and errors of ``refuse_unsafe``."""
    folder = Path(path)
    unopened = refuse_unsafe(folder, trust_remote_code=trust_remote_code, cure_of_code=cure_of_code)
    config = read_config(folder)
    pad = config.get("pad_token_id")
    entries = folder_entries(folder, set(unopened))
    return ModelFolder(
        folder,
        folder_digest(entries),
        name,
        pad if isinstance(pad, int) and pad >= 0 else 0,
        {file: Digest(entry.sha256, entry.bytes) for file, entry in entries.items()},
    )


def refuse_unsafe(folder: Path, *, trust_remote_code: bool = False, cure_of_code: str = _TRUST) -> list[Path]:
    """Checks a model folder without reading weights; returns the files that no library opens.

    Args:
        cure_of_code: what the error tells to do about pickled weights or code.

    Raises:
        ModelError: the folder holds no model, or pickled weights or code.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    refuse_no_model(folder)
    unopened = [] if trust_remote_code else unopened_files(folder)
    if not trust_remote_code:
        _refuse_untrusted(folder, unopened, cure_of_code)
    _check_weights(folder)
    return unopened


def open_unchanged(path: str | Path, name: str, *, trust_remote_code: bool) -> ModelFolder:
    """Opens a model folder, but rereads it only after a change of size, times or inode.

    Each process remembers its own readings only.
    """
    folder = Path(path)
    with _opening:
        now = sorted((str(file), _stamp(file)) for file in folder.rglob("*") if file.is_file())
        then, found = _opened.get((folder, trust_remote_code), (None, None))
        if found is None or then != now:
            found = open_model(folder, name, trust_remote_code=trust_remote_code)
            _opened[folder, trust_remote_code] = now, found
        return replace(found, name=name)


_opening = threading.Lock()
_opened: dict[tuple[Path, bool], tuple[list[tuple[str, tuple[int, ...]]], ModelFolder]] = {}


def open_committed(artefact: Artefact, name: str, *, trust_remote_code: bool) -> ModelFolder:
    """Opens a whole model of a run and checks its digests; reads files as ``open_unchanged`` does.

    Raises:
        RunDirError: a file is missing or has changed.
        ModelError: the folder must not be loaded.
    """
    files, path = artefact.manifest().files, artefact.local_folder()
    try:
        folder = open_unchanged(path, name, trust_remote_code=trust_remote_code)
    except ModelError:
        artefact.checked_folder()  # names a damaged file
        raise
    if any(folder.files.get(file) != (entry.sha256, entry.bytes) for file, entry in files.items()):
        artefact.checked_folder()  # names the file
        raise RunDirError(f"{path}: changed while it was read; restore it")
    return replace(folder, source=artefact)


def _stamp(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def open_artefact(artefact: Artefact, name: str, initial: ModelFolder) -> ModelFolder:
    """Opens a trained model or adapter and checks its digests."""
    folder, digest = artefact.checked_folder(), folder_digest(artefact.manifest().files)
    base = initial if is_adapter(folder) else None
    return ModelFolder(folder, digest, name, initial.pad_id, source=artefact, base=base)


def folder_here(path: str, revision: str | None = None) -> Path | None:
    """Returns the folder of ``model.path`` if it is on this machine or in the hub's cache; asks no hub.

    Raises:
        ModelError: the path is no name of a hub's model, and there is no such folder.
    """
    folder = Path(resolve(path)).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(path):
        raise ModelError(f"model.path {path}: no such folder")
    return cached_model(name_on_hub(path, revision))


def is_hub_name(path: str) -> bool:
    """Tells whether ``path`` has the form ``OWNER/NAME``."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def name_on_hub(path: str, revision: str | None) -> str:
    """Returns ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; ``revision`` is before that of ``path``."""
    return f"{path.partition('@')[0]}@{revision}" if revision else path


def find_folder(
    path: str, setting: str = "model.path", revision: str | None = None, *, trust_remote_code: bool = False
) -> Path:
    """Returns a local folder, fetched if ``path`` is on the hub; raises ModelError if there is none.

    Args:
        revision: branch, tag or commit on the hub, in place of that of ``path``.
        trust_remote_code: True fetches the model's code, too.
    """
    folder = Path(path).expanduser().absolute()  # Ray workers run in other folders
    if folder.exists():
        refuse_pattern(folder, setting)
        return folder
    if not is_hub_name(path):
        raise ModelError(f"{setting} {path}: no such folder")
    return fetch_model(name_on_hub(path, revision), setting, with_code=trust_remote_code)


def refuse_pattern(folder: Path | str, setting: str) -> None:
    """Raises ConfigError if a local path has characters of a pattern, behind which vLLM finds no weights.

    Of a store, whose root is a text, vLLM reads a copy on this machine.
    """
    if isinstance(folder, Path) and (found := sorted(set("*?[") & set(str(folder)))):
        raise ConfigError(f"{setting} {folder}: vLLM loads no model from a path with {' or '.join(found)}; rename it")


def check_folder(folder: Path, config: ModelConfig) -> Path:
    """Returns ``folder`` if its model is long enough.

    Raises:
        ModelError: the folder holds no model.
        ConfigError: the model has fewer positions than ``model.max_length``.
    """
    refuse_no_model(folder)
    limit = positions_of(read_config(folder))
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"model.max_length: {config.max_length} is more than the {limit} positions of {config.path}; lower it"
        )
    return folder


def positions_of(config: dict[str, Any]) -> int | None:
    """Returns the most tokens that the model takes, or None."""
    scopes = [scope for scope in (config, config.get("text_config")) if isinstance(scope, dict)]
    found = [scope.get(name) for scope in scopes for name in _POSITIONS]
    return min((limit for limit in found if isinstance(limit, int) and limit > 0), default=None)


def unopened_files(folder: Path) -> list[Path]:
    """Returns the files that no library opens: a trainer's, and weights in Meta's layout."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_unopened(path.relative_to(folder))]


def _is_unopened(path: Path) -> bool:
    return bool(
        _OF_A_TRAINER.fullmatch(path.name)
        or any(_FOLDER_OF_A_TRAINER.fullmatch(part) for part in path.parts[:-1])
        or (path.parts[0] == _METAS_LAYOUT and path.suffix in _CODE_OR_PICKLE)
    )


_OF_A_TRAINER = re.compile(
    r"(training_args|optimizer\w*|scheduler|scaler|rng_state\w*|random_states_\d+|trainer_state|"
    r"pytorch_model_fsdp\w*)\.(bin|pt|pth|pkl|json)|zero_to_fp32\.py"
)
_METAS_LAYOUT = "original"
_FOLDER_OF_A_TRAINER = re.compile(r"(checkpoint-|global_step)\d+|pytorch_model_fsdp_\d+|optimizer_\d+|runs")


def is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path) -> dict[str, Any]:
    """Reads adapter_config.json; raises ModelError if missing or no JSON object."""
    return _read_json(folder / _ADAPTER_CONFIG)


_ADAPTER_CONFIG = "adapter_config.json"


def refuse_no_model(folder: Path) -> None:
    """Raises ModelError if the folder holds an adapter, only checkpoints, or no config.json."""
    if is_adapter(folder):
        base = read_adapter(folder).get("base_model_name_or_path")
        raise ModelError(_ADAPTER.format(folder=folder, of=f" of {base}" if base else ""))
    if (folder / "config.json").is_file():
        return
    checkpoints = sorted(
        (path.parent.name for path in folder.glob("checkpoint-*/config.json")),
        key=lambda name: int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdecimal() else 0,
    )
    if checkpoints:
        raise ModelError(
            f"{folder}: has no config.json, but checkpoints of training ({', '.join(checkpoints)}); set model.path to "
            f"one, e.g. {folder / checkpoints[-1]}"
        )
    raise ModelError(f"{folder}: has no config.json; expected a model in Hugging Face layout")


_ADAPTER = (
    "{folder}: is an adapter{of}, not a model; merge it (peft: merge_and_unload, then save_pretrained) and "
    "take the merged folder"
)


def refuse_untrainable(folder: Path) -> None:
    """Raises ModelError if the weights are quantised or an adapter's."""
    config = read_config(folder)
    scopes = [scope for scope in (config, config.get("text_config")) if isinstance(scope, dict)]
    found = next((scope[key] for scope in scopes for key in _QUANTISATION if scope.get(key)), None)
    if found is None and (folder / "quantize_config.json").is_file():  # AutoGPTQ's and AutoAWQ's older folders
        found = {"quant_method": "gptq"} | _read_json(folder / "quantize_config.json")
    if found is None and (folder / "hf_quant_config.json").is_file():  # NVIDIA's ModelOpt
        found = {"quant_method": "modelopt"}
    kind = found.get("quant_method", "kind unknown") if isinstance(found, dict) else found
    packed = next((name for name in tensor_shapes(folder) if name.endswith(_QUANTISED)), None) or find_packed(folder)
    if kind is None and packed:
        kind = f"tensor {packed}"
    if kind is not None:
        raise ModelError(
            f"{folder}: its weights are quantised ({kind}) and cannot be trained; take the model that it was made "
            "from, or one saved after dequantising"
        )
    refuse_adapter(folder)


def refuse_adapter(folder: Path) -> None:
    """Raises ModelError if the weights are an adapter's."""
    if any(".lora_" in name for name in tensor_shapes(folder)):
        raise ModelError(_ADAPTER.format(folder=folder, of=""))


_QUANTISATION = ("quantization_config", "compression_config", "quantization")
_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".quant_state.bitsandbytes__nf4",
              ".absmax", ".SCB")  # fmt: skip


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    places = _read_json(index).get("weight_map") if index.is_file() else None
    if index.is_file() and not isinstance(places, dict):
        raise ModelError(f"{index}: has no weight_map; copy it again")
    if missing := missing_shards(folder):
        raise ModelError(f"{folder}: lacks {missing[0]}, which {index.name} names; copy all shards")
    if not weight_files(folder):
        own = " but those of Mistral's own layout" if list(folder.glob("consolidated*.safetensors")) else ""
        raise ModelError(
            f"{folder}: has no .safetensors weights{own}; convert them (save_pretrained writes safetensors)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json; raises ModelError if missing or no JSON object."""
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


def _refuse_untrusted(folder: Path, unopened: list[Path], cure_of_code: str) -> None:
    for path in sorted({*folder.rglob("*")} - {*unopened}):
        if path.suffix.lower() in _CODE_OR_PICKLE:
            raise ModelError(
                f"{path}: pickled weights and code can run anything when loaded; keep only safetensors, or "
                f"{cure_of_code}"
            )
    for path in sorted(folder.glob("*config.json")):
        if _has_key(_read_json(path), "auto_map"):
            raise ModelError(f"{path}: auto_map asks for the model's own code; {cure_of_code}")


def _has_key(tree: Any, key: str) -> bool:
    """Searches parsed JSON, as the text may escape the key."""
    if isinstance(tree, dict):
        return key in tree or any(_has_key(value, key) for value in tree.values())
    return isinstance(tree, list) and any(_has_key(value, key) for value in tree)
