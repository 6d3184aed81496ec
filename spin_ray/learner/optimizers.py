"""Optimizers by name or import path."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.import_path import import_object

MakeOptimizer = Callable[..., Optimizer]
"""Factory, called as ``make(parameters, lr=…)``, with ``weight_decay=…`` if it takes one."""


@dataclass(frozen=True, slots=True)
class KnownOptimizer:
    """An optimizer whose state can be allocated beforehand."""

    make: MakeOptimizer
    moments: tuple[str, ...]
    """State tensors of the parameter's shape."""
    can_fuse: bool = False
    """True: one CUDA kernel updates all parameters."""


OPTIMIZERS = {
    "rmsprop": KnownOptimizer(torch.optim.RMSprop, ("square_avg",)),
    "adamw": KnownOptimizer(torch.optim.AdamW, ("exp_avg", "exp_avg_sq"), can_fuse=True),
}


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> Optimizer:
    """Builds the optimizer without state; ``find_optimizer`` has the errors."""
    make, known = find_optimizer(config), OPTIMIZERS.get(config.name)
    if known is None:
        return make(parameters, lr=learning_rate)
    fused = known.can_fuse and all(parameter.device.type == "cuda" for parameter in parameters)
    return make(parameters, lr=learning_rate, **{"fused" if fused else "foreach": True})


def find_optimizer(config: OptimizerConfig) -> MakeOptimizer:
    """Returns the factory for the name or import path of ``config``, with its other settings.

    Raises:
        ConfigError: there is no such optimizer, or it does not take a setting that ``config`` has.
    """
    name: str = config.name
    known = OPTIMIZERS.get(name)
    make = known.make if known else import_object(name, "optimizer.name", OPTIMIZERS)
    if not callable(make):
        raise ConfigError(f"optimizer.name: {name} is nothing that can be called")
    given = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay or None}
    for argument, value in given.items():
        if value is not None and not _takes(make, argument):
            raise ConfigError(f"optimizer.{argument}: {name} takes no argument {argument}; leave it out")
    chosen: dict[str, Any] = {argument: value for argument, value in given.items() if value is not None}
    if _takes(make, "weight_decay"):
        chosen["weight_decay"] = config.weight_decay  # 0 too: an optimizer's own default may be another
    return partial(make, **chosen)


def allocate_state(optimizer: Optimizer, name: str) -> None:
    """Allocates a known optimizer's state: lack of memory shows at once, and checkpoints are alike."""
    if name not in OPTIMIZERS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # As torch does: fused kernels count on the card, others on the host.
            counted_on = parameter.device if group.get("fused") else "cpu"
            optimizer.state[parameter] = {"step": torch.zeros((), device=counted_on)} | {
                moment: torch.zeros_like(parameter, requires_grad=False) for moment in OPTIMIZERS[name].moments
            }


def allocate_by_a_step(optimizer: Optimizer) -> None:
    """Allocates any optimizer's state by a step of learning rate 0.

    Load weights and state afterwards: the step may count.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _takes(make: MakeOptimizer, argument: str) -> bool:
    parameters = inspect.signature(make).parameters
    return argument in parameters or any(it.kind is inspect.Parameter.VAR_KEYWORD for it in parameters.values())
