"""What both backends do to a model before and instead of sharding it."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spin_ray.config import OptimizerConfig


def decoder_layers(model: Any) -> list[nn.Module]:
    stacks = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return list(max(stacks, key=len, default=[]))


def recompute_activations(model: Any) -> None:
    """Makes the backward pass recompute what each decoder layer held.

    Not transformers' own switch, which works in training mode only, where dropout is on.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def bare_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer before its first step; the learning rate is set before each step."""
    kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[config.name]
    return kind(parameters, weight_decay=config.weight_decay, foreach=True)
