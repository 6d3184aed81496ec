"""Model folders in Hugging Face layout: read as fp32, written as safetensors."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from spin_ray.errors import ModelError
from spin_ray.learner.published import keep_form_of_config
from spin_ray.learner.tokenizer_file import name_plain_class
from spin_ray.learner.weights import COPIED_SUFFIXES, OTHER_LAYOUT, tensor_shapes

NOT_COPIED = {
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "trainer_state.json",
    "all_results.json",
    "eval_results.json",
    "predict_results.json",
    "test_results.json",
    "train_results.json",
}
TERMS = re.compile(
    r"(?:\w+[_-])?(?:licen[sc]e|notice|use[_-]policy)[\w -]*(?:\.\d+)*(?:\.(?:md|txt|rst|pdf))?", re.IGNORECASE
)
"""Files with licences and terms of use."""
FILE_BYTES = 2**30
"""Largest file of weights in bytes, unless one tensor is larger; writing takes twice the memory."""


def load_model(source: str | Path, *, trust_remote_code: bool, config: Any = None) -> Any:
    """Loads the causal LM in fp32 on the CPU, pickled weights only with ``trust_remote_code``.

    Args:
        config: replaces the folder's own; surplus weights are left out.

    Raises:
        ModelError: the folder lacks weights of the model.
    """
    config = config or AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    model, found = AutoModelForCausalLM.from_pretrained(
        str(source),
        output_loading_info=True,
        config=config,
        dtype=torch.float32,
        attn_implementation=first_attention(config),
        trust_remote_code=trust_remote_code,
        use_safetensors=None if trust_remote_code else True,
    )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(lacking(source, missing))
    return model


def lacking(source: str | Path, missing: list[str]) -> str:
    """Returns the error text about missing weights."""
    return f"{source}: lacks {len(missing)} of the model's weights, first {missing[0]}; save the whole model"


def first_attention(config: Any) -> str:
    """Returns SDPA, or eager attention for families that lack SDPA.

    ``choose_layout`` may change it later, except in Falcon's layers.
    """
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    lacks = family is not None and not family._supports_sdpa
    return "eager" if lacks else "sdpa"


def write_model(
    target: Path,
    model: Any,
    names: set[str],
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    source: str | Path,
    with_code: bool,
) -> None:
    """Writes ``weights`` (tied ones once), ``model``'s config in the form of ``source``'s, and ``source``'s tokenizer.

    Args:
        names: names of all ``weights``; if ``source`` has them all, one file of weights is in memory at a time.
    """
    # transformers refuses to save many published generation configs; the original file is copied over this one below.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    if Path(source).is_dir() and names <= tensor_shapes(Path(source)).keys():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        _write_files(target, weights)
    else:
        model.save_pretrained(target, state_dict=dict(weights))
    copy_other_files(Path(source), target, with_code=with_code)
    # After the code that it may name. The live parameters are fp32.
    keep_form_of_config(target, Path(source), str(dtype).removeprefix("torch."), trust_remote_code=with_code)


def copy_other_files(source: Path, target: Path, *, with_code: bool) -> None:
    """Copies tokenizer, chat templates, generation config and licences, if ``source`` is a folder.

    Other programs then load the tokenizer as the run did.
    """
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        if file.is_file() and _belongs(file, with_code):
            shutil.copyfile(file, target / file.name)
        elif file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
    name_plain_class(target)


def _write_files(target: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []
    size = total = 0

    def write() -> None:
        files.append(list(held))
        save_file(held, target / f"part-{len(files)}", metadata={"format": "pt"})
        held.clear()

    for name, weight in weights:
        if held and size + weight.nbytes > FILE_BYTES:
            write()
            size = 0
        held[name] = weight.contiguous()
        size, total = size + weight.nbytes, total + weight.nbytes
    write()
    called = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        called = ["model.safetensors"]
    else:
        places = {name: file for file, inside in zip(called, files, strict=True) for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for number, name in enumerate(called, start=1):
        (target / f"part-{number}").rename(target / name)


def _belongs(file: Path, with_code: bool) -> bool:
    if file.name.startswith(("_", ".")) or file.name in NOT_COPIED or OTHER_LAYOUT.fullmatch(file.name):
        return False
    return file.suffix in COPIED_SUFFIXES or (with_code and file.suffix == ".py") or bool(TERMS.fullmatch(file.name))
