"""Optimizers by name or import path."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spin_ray.config.packages import check_installed
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.import_path import import_object
from spin_ray.learner.sizes import MOMENTS

MakeOptimizer = Callable[..., Optimizer]  # called as make(parameters, lr=…)


@dataclass(frozen=True, slots=True)
class KnownOptimizer:
    """An optimizer whose state can be allocated beforehand."""

    make: MakeOptimizer
    moments: tuple[str, ...]
    """State tensors of the parameter's shape."""
    can_fuse: bool = False
    """True: ``fused`` is supported on GPUs."""
    can_batch: bool = True
    """True: ``foreach`` is supported."""


class AdamW8bit(Optimizer):
    """bitsandbytes' 8-bit AdamW (arXiv 2110.02861) on the local part of sharded weights.

    The moments' scales belong to that part, so a checkpoint fits one worker only.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, **settings: Any) -> None:
        check_installed("optimizer.name: adamw_8bit", "quantised")
        from bitsandbytes.optim import AdamW8bit as Local  # type: ignore[import-not-found]

        shards = list(parameters)
        super().__init__(shards, {"lr": lr})
        self._local = [nn.Parameter(_local(shard.data), requires_grad=True) for shard in shards]
        self._inner = Local(self._local, lr=lr, **settings)
        self._shards, self.param_groups = shards, self._inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the shards in place."""
        for shard, local in zip(self._shards, self._local, strict=True):
            if shard.grad is not None:
                local.grad = _local(shard.grad)
        self._inner.step(closure)
        for shard, local in zip(self._shards, self._local, strict=True):
            shard.grad = local.grad = None
            self.state[shard] = self._inner.state[local]


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


OPTIMIZERS = {
    "rmsprop": KnownOptimizer(torch.optim.RMSprop, MOMENTS["rmsprop"]),
    "adamw": KnownOptimizer(torch.optim.AdamW, MOMENTS["adamw"], can_fuse=True),
    # Its steps are as long as AdamW's, so that AdamW's learning rates hold.
    "muon": KnownOptimizer(partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), MOMENTS["muon"], can_batch=False),
}
BY_PATH = {"adamw_8bit": "spin_ray.learner.optimizers:AdamW8bit"}


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> Optimizer:
    """Builds the optimizer without state, in its mode of training; raises the errors of ``find_optimizer``."""
    make, known = find_optimizer(config), OPTIMIZERS.get(config.name)
    if known is None:
        made = make(parameters, lr=learning_rate)
        if has_modes(made):
            made.train()  # type: ignore[attr-defined]
        return made
    if not known.can_batch:
        return make(parameters, lr=learning_rate)
    fused = known.can_fuse and all(parameter.device.type == "cuda" for parameter in parameters)
    return make(parameters, lr=learning_rate, **{"fused" if fused else "foreach": True})


def is_own(name: str) -> bool:
    """Returns True for the import path of a user's optimizer."""
    return name not in OPTIMIZERS and name not in BY_PATH


def has_modes(optimizer: Any) -> bool:
    """Returns True for an optimizer that trains on other weights than those to use (schedule-free ones)."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


@contextmanager
def weights_to_use(optimizer: Any) -> Iterator[None]:
    """Switches an optimizer that has modes to ``eval``, and back to ``train``."""
    if not has_modes(optimizer):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def find_optimizer(config: OptimizerConfig) -> MakeOptimizer:
    """Returns the factory that ``config`` names, with the settings of ``config``.

    Raises:
        ConfigError: the optimizer does not exist, or does not take a setting.
    """
    name: str = config.name
    known = OPTIMIZERS.get(name)
    make = known.make if known else import_object(BY_PATH.get(name, name), "optimizer.name", [*OPTIMIZERS, *BY_PATH])
    if not callable(make):
        raise ConfigError(f"optimizer.name: {name} is nothing that can be called")
    given = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay or None}
    for argument, value in given.items():
        if value is not None and not _takes(make, argument):
            raise ConfigError(f"optimizer.{argument}: {name} takes no argument {argument}; leave it out")
    chosen: dict[str, Any] = {argument: value for argument, value in given.items() if value is not None}
    if _takes(make, "weight_decay"):
        chosen["weight_decay"] = config.weight_decay  # also 0, as the optimizer's own default may differ
    return partial(make, **chosen)


def allocate_state(optimizer: Optimizer, name: str) -> None:
    """Allocates a known optimizer's state, so that lack of memory shows at once and all checkpoints have it."""
    if name not in OPTIMIZERS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # As torch does: fused kernels count steps on the GPU, others on the CPU.
            counted_on = parameter.device if group.get("fused") else "cpu"
            optimizer.state[parameter] = {"step": torch.zeros((), device=counted_on)} | {
                moment: torch.zeros_like(parameter, requires_grad=False) for moment in OPTIMIZERS[name].moments
            }


def allocate_by_a_step(optimizer: Optimizer) -> None:
    """Allocates any optimizer's state by a step of learning rate 0.

    Load weights and state afterwards: the step may change both.
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
