"""What both backends do to a model before and after it is sharded."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spin_ray.config import OptimizerConfig
from spin_ray.learner.adapters import merge_adapters
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.hf_folder import write_model


def decoder_layers(model: Any) -> list[nn.Module]:
    stacks = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return list(max(stacks, key=len, default=[]))


def recompute_activations(model: Any) -> None:
    """Makes the backward pass recompute what each decoder layer held.

    Not transformers' own switch, which works in training mode only, where dropout is on.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def trainable(model: Any) -> list[nn.Parameter]:
    """All parameters, or with LoRA the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def bare_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer before its first step; the learning rate is set before each step."""
    kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[config.name]
    return kind(parameters, weight_decay=config.weight_decay, foreach=True)


def stored_as(weight: Tensor, settings: BackendSettings) -> torch.dtype:
    """What a gathered weight is held in until it is written: adapters are merged before anything is rounded."""
    if not weight.is_floating_point():
        return weight.dtype
    return torch.bfloat16 if settings.precision == "bf16" and settings.lora is None else torch.float32


def export(
    directory: Path, model: Any, weights: dict[str, Tensor], source: str | Path, settings: BackendSettings
) -> None:
    """Writes whole weights as a plain Hugging Face folder; adapters are merged into them."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    if settings.lora is not None:
        merged = merge_adapters(weights, settings.lora)
        weights = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in merged.items()}
    write_model(directory, model, weights, dtype=dtype, source=source, with_code=settings.trust_remote_code)
