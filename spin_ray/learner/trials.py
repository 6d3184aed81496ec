"""Trials of a user's own loss and optimizer on a few numbers, before anything runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError, first_line
from spin_ray.learner.losses import Loss, MarginLoss, PairValues
from spin_ray.learner.optimizers import BY_PATH, OPTIMIZERS, allocate_by_a_step, find_optimizer, make_optimizer

logger = logging.getLogger(__name__)

_POLICY = ((-30.0, -29.0), (-3.0, -4.0), (-12.5, -12.0), (-7.0, -6.5))
"""log p of y and y' of four pairs."""
_REFERENCE = ((-30.0, -29.0), (-3.2, -4.0), (-12.0, -12.5), (-7.0, -6.0))
"""The first pair's margin is 0, as each is at the first step."""
_WINS = ((0.9, 0.2), (0.5, 0.5), (0.6, 0.4), (0.7, 0.1))


def try_loss(loss: Loss, name: str, beta: float, *, in_fp64: bool, on_gpus: bool) -> None:
    """Computes a loss of several pairs, and of one, with its gradient.

    Args:
        name: its path.
        in_fp64: True also computes it in fp64, as the evaluation does.
        on_gpus: True if it will run on GPUs, so that failing on a CPU may mean nothing.

    Raises:
        ConfigError: the loss fails, or is no finite, differentiable sum over pairs.
    """
    per = getattr(loss, "per", None)
    if per not in ("pair", "token"):
        raise ConfigError(f"objective.loss: {name} has per {per!r}; expected 'pair' or 'token'")
    for dtype in (torch.float32, *((torch.float64,) if in_fp64 else ())):
        with _told(f"objective.loss: {name}", f"in {str(dtype).removeprefix('torch.')}", on_gpus=on_gpus):
            each = [_try(loss, name, beta, slice(at, at + 1), dtype) for at in range(len(_POLICY))]
            total = _try(loss, name, beta, slice(None), dtype)
            mean, tolerance = sum(each) / len(each), 1e-3 * (abs(total) + 1e-3)
            if abs(total - mean) < tolerance < abs(total - sum(each)):
                raise ConfigError(f"objective.loss: {name} gives the mean of the pairs; expected their sum")


def _try(loss: Loss, name: str, beta: float, pairs: slice, dtype: torch.dtype) -> float:
    policy = PairValues(*(each.requires_grad_() for each in _values(_POLICY, pairs, dtype)))
    reference = _values(_REFERENCE, pairs, dtype) if loss.needs_reference else None
    wins = _values(_WINS, pairs, dtype) if loss.needs_wins else None
    count = len(policy.real)
    where = f"for {count} pair{'s' if count > 1 else ''} in {str(dtype).removeprefix('torch.')}"
    if isinstance(loss, MarginLoss):
        margins = loss.margin(policy, reference, beta)
        _expect_tensor(loss.function(margins), (count,), name, where)
    total = loss(policy, reference, wins, beta)
    _expect_tensor(total, (), name, where)
    if (margin := loss.margin(policy, reference, beta)) is not None:
        _expect_tensor(margin, (count,), f"{name}.margin", where)
    _expect_gradient(total, policy, name, where)
    return float(total.detach())


def _values(rows: tuple[tuple[float, float], ...], pairs: slice, dtype: torch.dtype) -> PairValues:
    return PairValues(*torch.tensor(rows[pairs], dtype=dtype).T.contiguous().unbind())


def _expect_tensor(found: Any, shape: tuple[int, ...], name: str, where: str) -> None:
    expected = f"expected a tensor of shape {f'(pairs,) = {shape}' if shape else '()'}"
    if not isinstance(found, Tensor):
        raise ConfigError(f"objective.loss: {name} gives a {type(found).__name__} {where}; {expected}")
    if tuple(found.shape) != shape:
        raise ConfigError(f"objective.loss: {name} gives shape {tuple(found.shape)} {where}; {expected}")
    if not torch.isfinite(found).all():
        raise ConfigError(f"objective.loss: {name} gives {found.tolist()} {where}; expected finite numbers")


def _expect_gradient(total: Tensor, policy: PairValues, name: str, where: str) -> None:
    found = torch.autograd.grad(total, policy, allow_unused=True) if total.requires_grad else ()
    known = [each for each in found if each is not None]
    if not known:
        raise ConfigError(f"objective.loss: {name} has no gradient {where}; compute it from log p_θ without detach")
    if not all(torch.isfinite(each).all() for each in known):
        raise ConfigError(f"objective.loss: {name} has a gradient that is not finite {where}")


def try_optimizer(config: OptimizerConfig, *, matrices_only: bool, on_gpus: bool) -> None:
    """Takes two steps with a user's own optimizer on a CPU, and saves its state as checkpoints do.

    Args:
        matrices_only: True without a vector among the weights, as adapters have none.
        on_gpus: True if it will run on GPUs, so that failing on a CPU may mean nothing.

    Raises:
        ConfigError: it fails, is no ``torch.optim.Optimizer``, or its state cannot be saved.
    """
    name: str = config.name
    if name in OPTIMIZERS or name in BY_PATH:
        return
    where = "on a small matrix" + ("" if matrices_only else " and a vector")
    with _told(f"optimizer.name: {name}", where, on_gpus=on_gpus and not name.startswith("torch.optim:")):
        find_optimizer(config)
        _step_and_save(config, name, matrices_only=matrices_only)


def _step_and_save(config: OptimizerConfig, name: str, *, matrices_only: bool) -> None:
    shapes = ((4, 2),) if matrices_only else ((4, 2), (4,))
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make_optimizer(parameters, config, 1e-3)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer.name: {name} makes a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        )
    allocate_by_a_step(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    try:
        torch.save([*optimizer.state.values()], BytesIO())
    except Exception as error:
        raise ConfigError(
            f"optimizer.name: {name} has a state that no checkpoint can hold ({_said(error)}); keep tensors and numbers"
        ) from error


@contextmanager
def _told(what: str, where: str, *, on_gpus: bool) -> Iterator[None]:
    """Turns any error of a user's code into a ConfigError; all but wrong arguments may be due to the CPU alone."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if on_gpus and not isinstance(error, TypeError):
            logger.warning("%s could not be tried on this CPU (%s)", what, _said(error))
            return
        raise ConfigError(f"{what} fails {where} ({_said(error)})") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
