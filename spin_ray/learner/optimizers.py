"""Optimizers by name, or by an import path of the user's own."""

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
"""Called as ``make(parameters, lr=…)``; with ``weight_decay=…``, too, if it takes one, as torch's optimizers do."""


@dataclass(frozen=True, slots=True)
class KnownOptimizer:
    """An optimizer whose state can be allocated before its first step."""

    make: MakeOptimizer
    moments: tuple[str, ...]
    """Names of the state's tensors that have the parameter's shape."""


OPTIMIZERS = {
    "rmsprop": KnownOptimizer(partial(torch.optim.RMSprop, foreach=True), ("square_avg",)),
    "adamw": KnownOptimizer(partial(torch.optim.AdamW, foreach=True), ("exp_avg", "exp_avg_sq")),
}


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> Optimizer:
    """Builds the optimizer that ``config.name`` names (``my_pkg.mine:MyOptimizer``), without state.

    The backend sets the learning rate before each step.

    Raises:
        ConfigError: there is no such optimizer, or ``config`` has a weight decay and the optimizer takes none.
    """
    name: str = config.name
    make = find_optimizer(name)
    more: dict[str, Any] = {}
    if _takes(make, "weight_decay"):
        more["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise ConfigError(f"optimizer.weight_decay: {name} takes no argument weight_decay; leave it out")
    return make(parameters, lr=learning_rate, **more)


def find_optimizer(name: str) -> MakeOptimizer:
    """Returns what makes the optimizer of a name of ``OPTIMIZERS`` or of an import path.

    Raises:
        ConfigError: there is no such optimizer.
    """
    known = OPTIMIZERS.get(name)
    return known.make if known else import_object(name, "optimizer.name", OPTIMIZERS)


def allocate_state(optimizer: Optimizer, name: str) -> None:
    """Allocates the state of a known optimizer, so that lack of memory shows at once and checkpoints are alike.

    The state of any other appears with its first step.
    """
    if name not in OPTIMIZERS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {"step": torch.zeros(())} | {
                moment: torch.zeros_like(parameter, requires_grad=False) for moment in OPTIMIZERS[name].moments
            }


def allocate_by_a_step(optimizer: Optimizer) -> None:
    """Makes the state exist by a step of learning rate 0 along gradients of 0, for a checkpoint to be loaded into.

    Weights and state must be loaded afterwards: the step may count.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _takes(make: MakeOptimizer, argument: str) -> bool:
    """Returns whether ``make`` has ``argument``, by name or as one of any."""
    parameters = inspect.signature(make).parameters
    return argument in parameters or any(it.kind is inspect.Parameter.VAR_KEYWORD for it in parameters.values())
