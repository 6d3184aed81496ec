"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spin_ray.config.sections import LoraConfig
from spin_ray.errors import ModelError
from spin_ray.learner.hf_folder import copy_other_files
from spin_ray.learner.published import has_template, keep_form_of_config, remove_templates

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BESIDES_LORA = {
    "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
    "modules_to_save": None, "fan_in_fan_out": False, "trainable_token_indices": None, "layers_to_transform": None,
    "target_parameters": None, "alora_invocation_tokens": None, "lora_bias": False,
}  # fmt: skip
"""PEFT settings, with their values in plain LoRA."""


def read_lora(folder: Path) -> LoraConfig:
    """Returns an adapter's settings.

    Raises:
        ModelError: the adapter computes more than W + (alpha/rank)·B A.
    """
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name, plain in _BESIDES_LORA.items():
        if found.get(name) not in (plain, None):
            raise ModelError(f"{folder}/{CONFIG}: {name} is {found[name]!r}; only plain LoRA is trained further")
    targets = found["target_modules"]
    return LoraConfig(
        rank=found["r"],
        alpha=found["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
    )


def read_values(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Reads A and B by their names in PEFT's files.

    Raises:
        ModelError: the file holds other layers or shapes than ``shapes``.
    """
    found = load_file(folder / WEIGHTS)
    for name in sorted(found.keys() | shapes.keys()):
        here = tuple(found[name].shape) if name in found else None
        if here != shapes.get(name):
            raise ModelError(
                f"{folder}/{WEIGHTS}: {name} has shape {here}, and the model's adapter {shapes.get(name)}; set "
                "train.lora.rank and target_modules as this adapter has them"
            )
    return found


def write_adapter(
    target: Path, weights: Iterable[tuple[str, Tensor]], config: LoraConfig, *, base: str, source: str | Path
) -> None:
    """Writes an adapter that PEFT, transformers and vLLM load.

    Args:
        weights: A and B by their names in PEFT's files.
        base: name or folder by which PEFT finds the base model.
    """
    peft = import_peft()
    held = {name: weight.contiguous() for name, weight in weights}
    layers = config.target_modules
    if isinstance(layers, str):  # PEFT would ask each model anew what "all-linear" means
        layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in held}
    peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=sorted(layers), base_model_name_or_path=base,
        task_type="CAUSAL_LM", inference_mode=True,
    ).save_pretrained(str(target))  # fmt: skip
    save_file(held, target / WEIGHTS, metadata={"format": "pt"})
    copy_other_files(Path(source), target, with_code=False)  # no config.json: transformers would look for a whole model


def merge(
    base: Path, adapter: Path, target: Path, *, dtype: torch.dtype | Literal["auto"], trust_remote_code: bool
) -> None:
    """Merges any kind of adapter that PEFT can merge, and writes the whole model.

    Raises:
        ModelError: PEFT is missing or refuses.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    peft = import_peft(f"the adapter {adapter}")
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(base), dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=None if trust_remote_code else True
    )
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"{adapter}: cannot be merged into {base} ({' '.join(str(error).split())[:300]})") from error
    merged.generation_config = GenerationConfig.from_model_config(merged.config)  # as in write_model
    merged.save_pretrained(target)
    copy_other_files(base, target, with_code=trust_remote_code)
    if has_template(adapter):
        remove_templates(target)
    copy_other_files(adapter, target, with_code=trust_remote_code)  # its tokenizer may have more tokens
    name = str(merged.dtype).removeprefix("torch.")
    keep_form_of_config(target, base, name, trust_remote_code=trust_remote_code)


def import_peft(setting: str = "train.lora") -> Any:
    """Imports PEFT; raises ModelError, naming ``setting``, if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"{setting} cannot be used ({error}); pip install 'spin-ray[lora]'") from error
    return peft
