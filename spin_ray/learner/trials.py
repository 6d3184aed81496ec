"""Trials of a user's own loss and optimizer on a few numbers, before anything runs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError, first_line
from spin_ray.learner.backends import makes_dtensors
from spin_ray.learner.losses import Loss, MarginLoss, PairValues
from spin_ray.learner.optimizers import allocate_by_a_step, has_modes, is_own, make_optimizer

logger = logging.getLogger(__name__)

_POLICY = ((-30.0, -29.0), (-3.0, -4.0), (-12.5, -12.0), (-7.0, -6.5))
"""log p of y and y' of four pairs."""
_REFERENCE = ((-30.0, -29.0), (-3.2, -4.0), (-12.0, -12.5), (-7.0, -6.0))
"""The first pair's margin is 0, as each is at the first step."""
_WINS = ((0.9, 0.2), (0.5, 0.5), (0.6, 0.4), (0.7, 0.1))
_INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def try_loss(loss: Loss, name: str, beta: float, *, in_fp64: bool, on_gpus: bool) -> None:
    """Computes a loss of several pairs, three times, and of each alone, with its gradient.

    Args:
        name: its path.
        in_fp64: True also computes it in fp64, as the evaluation does.
        on_gpus: True if it will run on GPUs, so that failing on a CPU may mean nothing.

    Raises:
        ConfigError: the loss fails, is no finite, differentiable sum over pairs, keeps something between calls, or
            draws random numbers.
    """
    per = getattr(loss, "per", None)
    if per not in ("pair", "token"):
        raise ConfigError(f"objective.loss: {name} has per {per!r}; expected 'pair' or 'token'")
    for dtype in (torch.float32, *((torch.float64,) if in_fp64 else ())):
        with (
            _inductor_cache_kept(),
            _told(f"objective.loss: {name}", f"in {str(dtype).removeprefix('torch.')}", on_gpus=on_gpus),
        ):
            each = [_try(loss, name, beta, slice(at, at + 1), dtype) for at in range(len(_POLICY))]
            total, again, with_other_noise = (_try(loss, name, beta, slice(None), dtype, seed) for seed in (0, 0, 1))
            _expect_same(total, again, name, "keeps nothing from one call to the next, and is deterministic")
            _expect_same(total, with_other_noise, name, "is deterministic: it draws no random numbers")
            _expect_sum(total, each, name)


class _Tried(NamedTuple):
    """A loss of some pairs, and its gradient with respect to log p of y and y'."""

    value: float
    gradient: Float[Tensor, "2 pairs"]


def _expect_same(one: _Tried, other: _Tried, name: str, expected: str) -> None:
    if not _same(one, other):
        raise ConfigError(
            f"objective.loss: {name} gives {one.value:.7g} and then {other.value:.7g}, or another gradient, for the "
            f"same pairs; a loss {expected}"
        )


def _expect_sum(total: _Tried, each: list[_Tried], name: str) -> None:
    alone = _Tried(sum(one.value for one in each), torch.cat([one.gradient for one in each], dim=1))
    if _same(total, alone, tolerance=1e-4):
        return
    if abs(total.value - alone.value / len(each)) < 1e-3 * (abs(total.value) + 1e-3):
        raise ConfigError(f"objective.loss: {name} gives the mean of the pairs; expected their sum")
    raise ConfigError(
        f"objective.loss: {name} of {len(each)} pairs, {total.value:.7g}, or its gradient differs from the sum over "
        f"each pair alone, {alone.value:.7g}; expected a sum over pairs, since packs hold unequal numbers of them"
    )


def _same(one: _Tried, other: _Tried, tolerance: float = 1e-6) -> bool:
    apart, most = (one.gradient - other.gradient).abs().max(), one.gradient.abs().max()
    return abs(one.value - other.value) <= tolerance * (abs(one.value) + 1e-3) and bool(apart <= tolerance * most)


def _try(loss: Loss, name: str, beta: float, pairs: slice, dtype: torch.dtype, seed: int = 0) -> _Tried:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _compute(loss, name, beta, pairs, dtype)


def _compute(loss: Loss, name: str, beta: float, pairs: slice, dtype: torch.dtype) -> _Tried:
    leaves = [each.requires_grad_() for each in _values(_POLICY, pairs, dtype)]
    policy = PairValues(*(leaf * torch.ones_like(leaf) for leaf in leaves))  # a graph that backward frees, as a model's
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
    return _Tried(float(total.detach()), _gradient(total, leaves, name, where))


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


def _gradient(total: Tensor, leaves: list[Tensor], name: str, where: str) -> Float[Tensor, "2 pairs"]:
    if total.requires_grad:
        try:
            total.backward()
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise ConfigError(
                f"objective.loss: {name} keeps the graph of an earlier call; a loss keeps nothing from one call to the "
                "next"
            ) from error
    if all(leaf.grad is None for leaf in leaves):
        raise ConfigError(f"objective.loss: {name} has no gradient {where}; compute it from log p_θ without detach")
    found = torch.stack([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
    if not torch.isfinite(found).all():
        raise ConfigError(f"objective.loss: {name} has a gradient that is not finite {where}")
    return found


def try_optimizer(
    config: OptimizerConfig, *, matrices_only: bool, on_gpus: bool, backend: str = "fsdp2", workers: int = 1
) -> None:
    """Takes steps with a user's own optimizer on a CPU, and resumes them from a checkpoint.

    Args:
        matrices_only: True without a vector among the weights, as adapters have none.
        on_gpus: True if it will run on GPUs, so that failing on a CPU may mean nothing.
        backend: ``train.backend``. Weights of FSDP2 are DTensors.
        workers: ``train.workers``.

    Raises:
        ConfigError: it fails, is no ``torch.optim.Optimizer``, cannot be saved or goes on otherwise once resumed.
    """
    name: str = config.name
    if not is_own(name):
        return
    with _inductor_cache_kept():
        _try_optimizer(config, matrices_only, on_gpus, backend, workers)


def _try_optimizer(config: OptimizerConfig, matrices_only: bool, on_gpus: bool, backend: str, workers: int) -> None:
    name: str = config.name
    where = "on a small matrix" + ("" if matrices_only else " and a vector")
    shapes = ((4, 2),) if matrices_only else ((4, 2), (4,))
    passed = False
    with _told(f"optimizer.name: {name}", where, on_gpus=on_gpus and not name.startswith("torch.optim:")):
        _step_and_save(config, shapes, backend)
        passed = True
    if passed and makes_dtensors(backend):
        from spin_ray.learner.shard_trials import try_on_shards  # slow: torch.distributed.checkpoint

        try_on_shards(config, shapes, workers)


def _step_and_save(config: OptimizerConfig, shapes: tuple[tuple[int, ...], ...], backend: str) -> None:
    name: str = config.name
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make_optimizer(parameters, config, 1e-3)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer.name: {name} makes a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        )
    if backend == "deepspeed" and has_modes(optimizer):
        raise ConfigError(
            f"optimizer.name: {name} has eval(), which train.backend: deepspeed does not call before it exports; "
            "use fsdp2"
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
def _inductor_cache_kept() -> Iterator[None]:
    """Restores the variable that torch sets at the first step of an optimizer, and that workers would inherit."""
    before = os.environ.get(_INDUCTOR_CACHE)
    try:
        yield
    finally:
        os.environ.pop(_INDUCTOR_CACHE, None)
        if before is not None:
            os.environ[_INDUCTOR_CACHE] = before


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
