"""Checkpoints of sharded weights and of any optimizer's state."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from spin_ray.errors import ConfigError
from spin_ray.learner.optimizers import allocate_by_a_step, is_own

Shards = Mapping[str, nn.Parameter]


def save_checkpoint(directory: Path, shards: Shards, optimizer: Optimizer, name: str, steps_done: int) -> None:
    """Writes this rank's files; a collective.

    Args:
        name: ``optimizer.name``. The groups' values are kept for a user's own optimizer alone.
    """
    dcp.save(_content(shards, optimizer, name, steps_done), storage_writer=FileSystemWriter(directory))


def load_checkpoint(directory: Path, shards: Shards, optimizer: Optimizer, name: str) -> int:
    """Restores weights and state in place, and returns the number of steps done; a collective.

    Raises:
        ConfigError: the checkpoint holds state or groups of a user's own optimizer that cannot be restored.
    """
    if not optimizer.state:
        allocate_by_a_step(optimizer)
    reader = FileSystemReader(directory)
    saved = reader.read_metadata() if is_own(name) else None
    if saved is not None:
        _allocate_later_state(saved, shards, optimizer, name)
    content = _content(shards, optimizer, name, 0)  # live tensors, filled in place
    if saved is not None:
        content["groups"] = _groups_of(saved, content["groups"], name)
    dcp.load(content, storage_reader=reader)
    for number, values in content.get("groups", {}).items():
        optimizer.param_groups[int(number)].update(values)
    return int(content["steps_done"])


def _content(shards: Shards, optimizer: Optimizer, name: str, steps_done: int) -> dict[str, Any]:
    content: dict[str, Any] = {
        "weights": {key: shard.detach() for key, shard in shards.items() if shard.requires_grad},
        "optimizer": {key: optimizer.state[shard] for key, shard in shards.items() if shard in optimizer.state},
        "steps_done": torch.tensor(steps_done),
    }
    if is_own(name):
        content["groups"] = {
            str(number): {key: value for key, value in group.items() if key not in ("params", "lr")}
            for number, group in enumerate(optimizer.param_groups)
        }
    return content


def _allocate_later_state(saved: Metadata, shards: Shards, optimizer: Optimizer, name: str) -> None:
    """Allocates state that the first step does not make."""
    for key, path in _paths(saved, "optimizer"):
        shard, state = shards[path[0]], optimizer.state[shards[path[0]]]
        if len(path) != 2 or path[1] in state:
            continue
        found = saved.state_dict_metadata[key]
        if not isinstance(found, TensorStorageMetadata):
            state[path[1]] = None
        elif found.size == shard.size():
            state[path[1]] = torch.zeros_like(shard, dtype=found.properties.dtype, requires_grad=False)
        elif not found.size:
            state[path[1]] = torch.zeros((), dtype=found.properties.dtype)
        else:
            raise ConfigError(
                f"optimizer.name: {name} makes state[parameter][{path[1]!r}] of shape {tuple(found.size)} after its "
                "first step, so that it cannot be restored; make it in the first"
            )


def _groups_of(saved: Metadata, now: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Returns the groups' values that a checkpoint holds: none if groups have parameters and learning rate alone."""
    kept: dict[str, dict[str, Any]] = {}
    for entry, (number, key, *deeper) in _paths(saved, "groups"):
        if number not in now:
            raise ConfigError(
                f"optimizer.name: {name} has {len(now)} parameter groups, and more in its checkpoint; use as many "
                "workers and the train.mesh of before"
            )
        found, held = saved.state_dict_metadata[entry], _at(now[number], (key, *deeper))
        is_tensor = isinstance(found, TensorStorageMetadata)
        if (is_tensor and getattr(held, "shape", None) != found.size) or (deeper and held is _NOTHING):
            where = "".join(f"[{step!r}]" for step in (int(number), key, *deeper))
            of_shape = f" of shape {tuple(found.size)}" if is_tensor else ""
            raise ConfigError(
                f"optimizer.name: {name} makes param_groups{where}{of_shape} after its first step, so that it cannot "
                "be restored; make it in the first"
            )
        kept.setdefault(number, {})[key] = now[number].get(key)
    return kept


_NOTHING = object()


def _at(values: Any, path: tuple[Any, ...]) -> Any:
    """Returns the value at a path within dicts and lists, or ``_NOTHING``."""
    for step in path:
        try:
            values = values[step]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return values


def _paths(saved: Metadata, kind: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for key, (first, *path) in saved.planner_data.items():
        if first == kind:
            yield key, tuple(path)
