"""LoRA by PEFT."""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from spin_ray.config.sections import LoraConfig
from spin_ray.errors import ModelError
from spin_ray.learner.adapter_folder import import_peft, read_values
from spin_ray.learner.loading import on_meta
from spin_ray.learner.weights import tensor_shapes

_LINEAR = (nn.Linear, Conv1D)
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add_adapters(model: Any, config: LoraConfig, *, seed: int, values: Path | None = None) -> None:
    """Replaces linear layers by x ↦ W x + (alpha/rank)·B A x; only A and B are trained.

    Args:
        values: adapter folder with the first A and B.

    Raises:
        ModelError: PEFT is missing, named layers do not exist or are not linear, or ``values`` do not fit.
    """
    peft = import_peft()
    names = list(_linear(model))
    targets = linear_layers(model, config.target_modules)
    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        try:
            peft.inject_adapter_in_model(adapters, model)
        except ValueError as error:
            refuse_absent(config.target_modules, names)
            raise ModelError(f"train.lora.target_modules: {error}") from error
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not isinstance(module.get_base_layer(), _LINEAR):
            kind = type(module.get_base_layer()).__name__
            raise ModelError(f"train.lora.target_modules: {name} is no linear layer but a {kind}; name others")
    refuse_absent(config.target_modules, names)
    model.eval()
    set_first_values(dict(model.named_parameters()), seed=seed, values=values)


def refuse_unadaptable(folder: Path, config: LoraConfig, *, trust_remote_code: bool) -> None:
    """Checks before a run that the model can get the adapters; a model with its own code by its weights' names alone.

    Raises:
        ModelError: as ``add_adapters``, or a layer cannot be merged.
    """
    if trust_remote_code:
        matrices = [name.removesuffix(".weight") for name, shape in tensor_shapes(folder).items() if len(shape) == 2]
        return refuse_absent(config.target_modules, matrices) if matrices else None
    model = on_meta(AutoConfig.from_pretrained(folder))
    if config.merge:
        _refuse_tied_head(model, config.target_modules)
    add_adapters(model, config, seed=0)


def refuse_absent(wanted: str | tuple[str, ...], layers: Sequence[str]) -> None:
    """Raises ModelError for a target in which no layer's name ends, and names those that are alike."""
    for end in () if isinstance(wanted, str) else wanted:
        if _ending_in(end, layers):
            continue
        parts = end.count(".") + 1
        alike = get_close_matches(end, {".".join(name.split(".")[-parts:]) for name in layers})
        known = alike or sorted({name.rpartition(".")[2] for name in layers})
        raise ModelError(f"train.lora.target_modules: the model has no linear layer {end}; it has {', '.join(known)}")


def _refuse_tied_head(model: Any, wanted: str | tuple[str, ...]) -> None:
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        return
    for name, module in _linear(model).items():
        if module is head and name in linear_layers(model, wanted):
            raise ModelError(
                f"train.lora.target_modules: {name} shares its weight with the embedding, and a merge would change "
                "both; leave it out, or set train.lora.merge: false"
            )


def linear_layers(model: Any, wanted: str | tuple[str, ...]) -> list[str]:
    """Returns the linear layers to adapt: all but the head (``all-linear``), or those whose names end in ``wanted``.

    PEFT alone would also adapt experts in one tensor, which cannot be merged layer by layer.
    """
    head, linear = model.get_output_embeddings(), _linear(model)
    if isinstance(wanted, str):
        return [name for name, module in linear.items() if module is not head]
    ending = {end: _ending_in(end, linear) for end in wanted}
    # PEFT decides about an end that no linear layer has.
    return list(wanted) if not all(ending.values()) else sorted({name for names in ending.values() for name in names})


def _linear(model: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}


def _ending_in(end: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{end}")]


@torch.no_grad()
def set_first_values(parameters: dict[str, nn.Parameter], *, seed: int, values: Path | None = None) -> None:
    """Reads A and B from ``values``; without it, A is random, equal on all ranks, and B is 0.

    Raises:
        ModelError: ``values`` are of other layers or shapes.
    """
    adapters = {name: parameter for name, parameter in parameters.items() if is_adapter(name)}
    shapes = {file_name(name): tuple(parameter.shape) for name, parameter in adapters.items()}
    stored = read_values(values, shapes) if values is not None else None
    for name, parameter in adapters.items():
        if parameter.is_meta:
            continue
        if stored is not None:
            value = stored[file_name(name)].float()
        else:
            value = torch.zeros(parameter.shape)
            if _DOWN in name:
                random = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=random)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)
        else:
            parameter.copy_(value)


def is_adapter(name: str) -> bool:
    return _DOWN in name or _UP in name


def file_name(name: str) -> str:
    """Returns an adapter's name in PEFT's files."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def stored_name(name: str) -> str:
    """Returns the parameter's name in the model folder."""
    return name.replace(_BASE, ".")


def merge_adapters(
    weights: Iterable[tuple[str, Tensor]], config: LoraConfig, model: Any
) -> Iterator[tuple[str, Tensor]]:
    """Yields a plain model's weights: W + (alpha/rank)·B A in fp32.

    Args:
        model: the adapted model. Its ``Conv1D`` layers (GPT-2) store Wᵀ.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights:
        part = next((part for part in (_BASE, _DOWN, _UP) if f"{part}weight" in name), None)
        if part is None:
            yield stored_name(name), weight
            continue
        layer = name.partition(part)[0]
        found = waiting.setdefault(layer, {})
        found[part] = weight.float()
        if len(found) == 3:
            del waiting[layer]
            change = (found[_UP] @ found[_DOWN]) * (config.alpha / config.rank)
            is_transposed = isinstance(model.get_submodule(layer).get_base_layer(), Conv1D)
            yield f"{layer}.weight", found[_BASE] + (change.T if is_transposed else change)
    assert not waiting, f"adapters without a layer: {sorted(waiting)}"
