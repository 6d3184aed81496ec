"""Optimizers by name or import path."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


OPTIMIZERS = {
    "rmsprop": KnownOptimizer(partial(torch.optim.RMSprop, foreach=True), ("square_avg",)),
    "adamw": KnownOptimizer(partial(torch.optim.AdamW, foreach=True), ("exp_avg", "exp_avg_sq")),
}


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> Optimizer:
    """Builds the optimizer without state; ``find_optimizer`` has the errors."""
    return find_optimizer(config)(parameters, lr=learning_rate)


def find_optimizer(config: OptimizerConfig) -> MakeOptimizer:
    """Returns the factory for the name or import path of ``config``, with its weight decay.

    Raises:
        ConfigError: there is no such optimizer, or it takes no weight decay and ``config`` has one.
    """
    name: str = config.name
    known = OPTIMIZERS.get(name)
    make = known.make if known else import_object(name, "optimizer.name", OPTIMIZERS)
    if not callable(make):
        raise ConfigError(f"optimizer.name: {name} is nothing that can be called")
    if _takes(make, "weight_decay"):
        return partial(make, weight_decay=config.weight_decay)
    if config.weight_decay:
        raise ConfigError(f"optimizer.weight_decay: {name} takes no argument weight_decay; leave it out")
    return make


def allocate_state(optimizer: Optimizer, name: str) -> None:
    """Allocates a known optimizer's state: lack of memory shows at once, and checkpoints are alike."""
    if name not in OPTIMIZERS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {"step": torch.zeros(())} | {
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
