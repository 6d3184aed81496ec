"""Start models that are PEFT adapters, merged with their base model once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from spin_ray.config.recipe import digest
from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ModelError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import check_folder, find_folder, is_adapter, read_adapter, refuse_unsafe
from spin_ray.run_dir.artefact import CARD, folder_entries
from spin_ray.run_dir.cache import cache_root, filling

WEIGHTS = "adapter_model.safetensors"


def find_model(config: ModelConfig) -> Path:
    """Returns the folder of ``model.path``, fetched if on the hub and merged if an adapter.

    Raises:
        ModelError: there is no such model, or its adapter cannot be merged.
        ConfigError: the model has fewer positions than ``model.max_length``.
    """
    trusts = config.trust_remote_code
    named = find_folder(resolve(config.path), revision=config.revision, trust_remote_code=trusts)
    return check_folder(without_adapter(named, config), config)


def without_adapter(folder: Path, config: ModelConfig) -> Path:
    """Returns ``folder``, or for an adapter the cached folder of its merged model.

    Raises:
        ModelError: a base model is missing, or named for a whole model, or the adapter cannot be merged.
    """
    if not is_adapter(folder):
        if config.base is not None:
            raise ModelError(f"model.base: {folder} is no adapter; leave model.base out")
        return folder
    _check(folder)
    base = _base_of(folder, config)
    root = cache_root() / "merged"
    target = root / digest([*_state(base), *((name, it.sha256) for name, it in folder_entries(folder).items())])
    if target.is_dir():
        return target
    with filling(target) as attempt:
        if attempt:
            from spin_ray.learner.adapter_folder import merge  # slow: torch

            merge(base, folder, attempt, dtype="auto", trust_remote_code=config.trust_remote_code)
            if (base / CARD).is_file():
                shutil.copyfile(base / CARD, attempt / CARD)  # for its licence
    return target


def _check(folder: Path) -> None:
    kind = read_adapter(folder).get("peft_type", "LORA")
    if kind not in ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA"):
        raise ModelError(f"{folder}: is a {kind} adapter, which no model can be merged with; take a LoRA adapter")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: is an adapter without {WEIGHTS}; save it as safetensors")


def _base_of(folder: Path, config: ModelConfig) -> Path:
    """Returns the folder of ``model.base``, or of the model and revision that the adapter names, as PEFT loads it."""
    named = read_adapter(folder)
    name = config.base or named.get("base_model_name_or_path")
    revision = None if config.base else named.get("revision")
    if not name:
        raise ModelError(f"{folder}: is an adapter that names no model; set model.base")
    base = find_folder(resolve(name), "model.base", revision, trust_remote_code=config.trust_remote_code)
    refuse_unsafe(base, trust_remote_code=config.trust_remote_code)
    return base


def _state(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Yields path, size and time of each file; digesting weights at each start would be slow."""
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        yield str(path), stat.st_size, stat.st_mtime_ns
