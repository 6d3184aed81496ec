"""Model folders in Hugging Face layout: in as fp32 master weights, out as safetensors with everything serving needs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

NOT_COPIED = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"}
COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Of tokenizers, chat templates, generation config and licence; weights and ``_MANIFEST.json`` are left behind."""


def load_model(source: str | Path, *, trust_remote_code: bool, config: Any = None) -> Any:
    """The causal LM in fp32 on the CPU. Pickled weights are not read unless the folder's code is trusted anyway.

    Args:
        config: instead of the folder's own; weights that it has no place for are left out.
    """
    return AutoModelForCausalLM.from_pretrained(
        str(source),
        config=config,
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
        use_safetensors=None if trust_remote_code else True,
    )


def write_model(
    target: Path, model: Any, weights: dict[str, Tensor], *, dtype: torch.dtype, source: str | Path, with_code: bool
) -> None:
    """Writes ``weights`` (whole tensors, tied ones once) under ``model``'s config; copies the tokenizer of ``source``.

    Args:
        with_code: copy the folder's own Python files too (models with remote code).
    """
    # A fresh one: transformers refuses to save many published generation configs (temperature without do_sample …), and
    # the original file is copied over it below.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(target, state_dict=weights)
    config_file = target / "config.json"
    config = json.loads(config_file.read_text())  # says fp32, as the live parameters are
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in sorted(Path(source).iterdir()) if Path(source).is_dir() else ():
        if file.is_file() and _belongs(file, with_code):
            shutil.copyfile(file, target / file.name)
        elif file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)


def _belongs(file: Path, with_code: bool) -> bool:
    if file.name.startswith(("_", ".")) or file.name in NOT_COPIED:
        return False
    return file.suffix in COPIED_SUFFIXES or (with_code and file.suffix == ".py") or file.stem in ("LICENSE", "NOTICE")
