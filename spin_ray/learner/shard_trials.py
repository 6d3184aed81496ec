"""Trials of a user's own optimizer on weights as FSDP2 shards them, with a checkpoint between its steps."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError, first_line
from spin_ray.learner.optimizer_state import load_checkpoint, save_checkpoint
from spin_ray.learner.optimizers import make_optimizer, weights_to_use

_BEFORE, _AFTER = 3, 8
"""Steps before and after the checkpoint."""


def try_on_shards(config: OptimizerConfig, shapes: tuple[tuple[int, ...], ...], workers: int) -> None:
    """Takes steps on DTensors of one rank, once undisturbed and once resumed from a checkpoint.

    Raises:
        ConfigError: a step fails, a checkpoint cannot be written or read, the resumed weights differ, or several
            workers would have state of their own.
    """
    name: str = config.name
    try:
        with _one_rank() as mesh, _temporary_folder(name) as folder:
            lost, own = _lost_by_a_checkpoint(config, shapes, mesh, folder)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"optimizer.name: {name} works on plain tensors, but fails on DTensors, as FSDP2 shards weights "
            f"({type(error).__name__}: {first_line(error)}); take another, or have it work on parameter.to_local()"
        ) from error
    if lost is not None:
        raise ConfigError(
            f"optimizer.name: {name} goes on otherwise after a checkpoint, which does not hold {lost}; keep it in "
            "state[parameter] or param_groups, and draw random numbers from torch's default generator"
        )
    if own and workers > 1:
        raise ConfigError(
            f"optimizer.name: {name} keeps state[parameter][{own[0]!r}] as a plain tensor of each worker, of which a "
            "checkpoint holds one worker's alone; make a DTensor, as torch.zeros_like(parameter) and operations on the "
            "parameter do"
        )


class _Run:
    """An optimizer with its shards."""

    def __init__(self, config: OptimizerConfig, shapes: tuple[tuple[int, ...], ...], mesh: DeviceMesh) -> None:
        self._mesh = mesh
        values = [torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape) for shape in shapes]
        self.shards = {
            f"weight{number}": nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
            for number, value in enumerate(values)
        }
        self.optimizer: Optimizer = make_optimizer([*self.shards.values()], config, 1e-3)

    def step(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        for shard in self.shards.values():
            gradient = torch.linspace(0.1, 1 + number % 3, shard.numel()).reshape(shard.shape)
            shard.grad = distribute_tensor(gradient, self._mesh, [Shard(0)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)  # the same noise in both runs
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def states(self) -> Iterator[tuple[Any, Tensor]]:
        """Yields each tensor of the parameters' state, with the key that holds it."""
        for shard in self.shards.values():
            for key, value in self.optimizer.state.get(shard, {}).items():
                for tensor in _tensors_in(value):
                    yield key, tensor

    def weights(self) -> list[Tensor]:
        with weights_to_use(self.optimizer):
            return [_whole(shard).detach().clone() for shard in self.shards.values()]


def _lost_by_a_checkpoint(
    config: OptimizerConfig, shapes: tuple[tuple[int, ...], ...], mesh: DeviceMesh, folder: Path
) -> tuple[str | None, list[str]]:
    """Returns what a checkpoint does not hold if the weights show it, and the keys of plain tensors in the state.

    A plain tensor of one element, such as a count of steps, is taken to be alike on all workers.
    """
    undisturbed, resumed = (_Run(config, shapes, mesh) for _ in range(2))
    for number in range(_BEFORE):
        undisturbed.step(number)
    with _checkpointing(config.name, folder):
        save_checkpoint(folder, undisturbed.shards, undisturbed.optimizer, config.name, _BEFORE)
        load_checkpoint(folder, resumed.shards, resumed.optimizer, config.name)
    lost = _differences(undisturbed, resumed)
    for run in (undisturbed, resumed):
        for number in range(_BEFORE, _BEFORE + _AFTER):
            run.step(number)
    same = all(torch.equal(one, other) for one, other in zip(undisturbed.weights(), resumed.weights(), strict=True))
    own = [key for key, tensor in undisturbed.states() if not isinstance(tensor, DTensor) and tensor.numel() > 1]
    return (None if same else ", ".join(lost) or "something that it keeps elsewhere"), own


def _differences(undisturbed: _Run, resumed: _Run) -> list[str]:
    parameters = set(undisturbed.shards.values())
    before, after = vars(undisturbed.optimizer), vars(resumed.optimizer)
    attributes = [
        key for key in before if key not in ("state", "param_groups") and _differ(before[key], after.get(key))
    ]
    keys = [key for key in undisturbed.optimizer.state if key not in parameters]
    kinds = {key: " (a torch.Generator)" for key in attributes if isinstance(before[key], torch.Generator)}
    return [f"self.{key}{kinds.get(key, '')}" for key in attributes] + [f"state[{key!r}]" for key in keys]


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(_whole(one), _whole(other))
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        return not torch.equal(one.get_state(), other.get_state())
    return isinstance(one, bool | int | float | str | None) and one != other


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


@contextmanager
def _temporary_folder(name: str) -> Iterator[Path]:
    try:
        folder = TemporaryDirectory()
    except OSError as error:
        raise _not_written(name, gettempdir(), error) from error
    with folder:
        yield Path(folder.name)


@contextmanager
def _checkpointing(name: str, folder: Path) -> Iterator[None]:
    """Turns a failure of saving or loading, which torch raises as a BaseException, into a ConfigError."""
    try:
        yield
    except CheckpointException as failed:
        errors = [error for error, _ in failed.failures.values()]
        causes = [cause for error in errors for cause in _chain(error) if isinstance(cause, OSError)]
        if causes:
            raise _not_written(name, folder.parent, causes[0]) from failed
        said = "; ".join(f"{type(error).__name__}: {first_line(error)}" for error in errors)
        raise ConfigError(
            f"optimizer.name: {name} has a state or param_groups that no checkpoint can hold or restore ({said}); keep "
            "tensors, numbers and what can be pickled, of one shape from the first step on"
        ) from failed
    except OSError as error:
        raise _not_written(name, folder.parent, error) from error


def _not_written(name: str, folder: object, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{folder}: the checkpoint of a trial of optimizer.name: {name} cannot be written or read there "
        f"({type(error).__name__}: {first_line(error)}); make room, or set $TMPDIR to another folder"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _one_rank() -> Iterator[DeviceMesh]:
    """Yields a mesh of this process alone; a process group that exists is used and stays."""
    starts, hook = not dist.is_initialized(), sys.excepthook
    if starts:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        if starts:
            dist.destroy_process_group()
            sys.excepthook = hook  # torch sets one that writes [rank0] before each line of an error
