"""The choice of the train workers' mesh."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig, Mesh
from spin_ray.errors import ConfigError, ModelError, ResourceError
from spin_ray.inputs.model_folder import read_config
from spin_ray.learner.tensor_plan import why_not_split
from spin_ray.planning.hardware import CPU, GB
from spin_ray.planning.learner_cost import FILLED, full_memory, most_offloaded_bytes, settle_checkpointing
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.work import Planned

TENSOR_SIZES = (2, 4, 8)
"""Sizes that ``auto`` tries, each within a node."""
SHARDED = ("weights", "optimizer", "gradients", "whole gradients")
"""Purposes of memory that shrink with more workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """The node of each train worker, in order of ranks."""

    node_of_rank: tuple[int, ...]
    room: float
    """Bytes of the smallest device."""

    @property
    def workers(self) -> int:
        return len(self.node_of_rank)

    @property
    def per_node(self) -> tuple[int, ...]:
        """Workers of each node, in order of ranks. A node with scattered ranks appears more than once."""
        return tuple(len(list(run)) for _, run in groupby(self.node_of_rank))

    @property
    def neighbours(self) -> bool:
        """True if the workers of each node have consecutive ranks, as Ray Train sorts them (worker_group.py)."""
        return len(self.per_node) == len(set(self.node_of_rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    mesh: Mesh
    reason: str
    """One sentence, without a full stop."""

    def __str__(self) -> str:
        return f"train.mesh: {self.mesh}: {self.reason}"


def mesh_of(config: SpinConfig, folder: Path, node_of_rank: tuple[int, ...], room: float | None) -> Choice:
    """Returns the mesh for the model in ``folder``; raises as ``choose_mesh``.

    Args:
        room: bytes of the smallest GPU. None: a CPU worker's share.
    """
    placing = Placing(node_of_rank=node_of_rank, room=room or CPU.share(config.train.resources).memory)
    if placing.workers == 1 and config.train.mesh == "auto":
        return Choice(mesh=Mesh(), reason="there is one worker")
    try:
        shape = ModelShape.from_folder(folder)
    except ModelError:
        shape = None
    return choose_mesh(config, shape, placing)


def choose_mesh(config: SpinConfig, shape: ModelShape | None, placing: Placing) -> Choice:
    """Returns the recipe's mesh, or chooses one for ``auto``.

    Args:
        shape: None if the model's sizes are unknown. ``check_mesh`` then has tried the recipe's mesh.

    Raises:
        ConfigError: the recipe's mesh has another number of ranks.
        ModelError: the model cannot be split as the recipe says.
        ResourceError: the recipe's mesh needs neighbours, and a node's workers are scattered over the ranks.
    """
    if isinstance(config.train.mesh, Mesh):
        return _given(config.train.mesh, shape, placing)
    workers, each = placing.workers, placing.per_node
    flat = Mesh(shard=workers)
    if config.train.backend != "fsdp2":
        return Choice(mesh=flat, reason=f"train.backend {config.train.backend} shards over all workers")
    if shape is None and len(each) > 1:
        return Choice(mesh=flat, reason="the plan does not know the sizes of this model, so one copy is over all")
    if not placing.neighbours:
        return Choice(mesh=flat, reason="the workers of a node are no neighbours in rank, so one copy is over all")
    if len(set(each)) > 1:
        return Choice(mesh=flat, reason=f"the nodes have unequal numbers of workers {each}, so one copy is over all")
    tensor, because = _tensor(config, shape, placing) if shape else (1, "")
    if len(each) == 1:
        reason = because or f"the {workers} workers are on one node and share one copy of the weights"
        return Choice(mesh=Mesh(shard=workers // tensor, tensor=tensor), reason=reason)
    assert shape is not None
    within = Mesh(replicate=len(each), shard=each[0] // tensor, tensor=tensor)
    needed = memory_of(config, shape, within, placing.room)
    there_are = f"{needed / GB:.0f} GB a device of {placing.room / GB:.0f}"
    if needed <= FILLED * placing.room:
        reason = f"a copy over the {each[0]} workers of a node fits ({there_are}), so only gradients cross the network"
        return Choice(mesh=within, reason="; ".join(filter(None, (because, reason))))
    reason = f"a copy over the {each[0]} workers of a node would not surely fit ({there_are}), so one is over all"
    mesh = Mesh(shard=workers // tensor, tensor=tensor)
    return Choice(mesh=mesh, reason="; ".join(filter(None, (because, reason))))


def _given(mesh: Mesh, shape: ModelShape | None, placing: Placing) -> Choice:
    if mesh.ranks != placing.workers:
        raise ConfigError(
            f"train.mesh: {mesh} is for {mesh.ranks} workers and there are {placing.workers}; "
            "change its sizes or use train.mesh: auto"
        )
    if shape and mesh.tensor > 1 and (reason := shape.why_not_split(mesh.tensor)):
        raise ModelError(f"train.mesh.tensor: {reason}; give another size, or 1")
    if (mesh.replicate > 1 or mesh.tensor > 1) and not placing.neighbours:
        raise ResourceError(
            f"train.mesh: {mesh} needs the workers of a node to be neighbours, but the ranks are on nodes "
            f"{list(placing.node_of_rank)}; use train.mesh: {{shard: {placing.workers}}}"
        )
    return Choice(mesh=mesh, reason="the recipe says so")


def _tensor(config: SpinConfig, shape: ModelShape, placing: Placing) -> tuple[int, str]:
    train, workers = config.train, placing.workers
    if not train.resources.gpus or train.lora is not None or train.compile is True:
        return 1, ""
    needed = memory_of(config, shape, Mesh(shard=workers), placing.room)
    if needed > placing.room:
        for size in _tensor_sizes(shape, placing):
            if memory_of(config, shape, Mesh(shard=workers // size, tensor=size), placing.room) <= placing.room:
                lacks = f"a pack and a layer take {needed / GB:.0f} GB on a device of {placing.room / GB:.0f}"
                return size, f"{lacks}, so {size} workers split each layer"
    if train.global_batch_pairs < workers and (sizes := [*_tensor_sizes(shape, placing)]):
        size = next((size for size in sizes if workers // size <= train.global_batch_pairs), sizes[-1])
        lacks = f"a step's {train.global_batch_pairs} pairs are too few for {workers} workers"
        return size, f"{lacks}, so {size} workers split each layer"
    return 1, ""


def _tensor_sizes(shape: ModelShape, placing: Placing) -> Iterator[int]:
    return (size for size in TENSOR_SIZES if placing.per_node[0] % size == 0 and not shape.why_not_split(size))


# Memory


def memory_of(config: SpinConfig, shape: ModelShape, mesh: Mesh, room: float) -> float:
    """Returns the bytes of a rank that trains full packs."""
    optimizer = config.train.optimizer
    settled = settle_checkpointing(config, shape, room, optimizer, mesh)
    return sum(full_memory(settled, shape, optimizer, mesh).values())


# Limits of every mesh


def check_mesh(
    config: SpinConfig, folder: Path, room: float | None, algorithm: Planned, *, memory: float | None = None
) -> None:
    """Checks the mesh before anything runs.

    Args:
        room: bytes of this machine's GPU, if it has one and the run stays on it.
        memory: bytes of this machine's memory, likewise.

    Raises:
        ModelError: the model cannot be split as the recipe says.
        ResourceError: prompts are too long for every mesh, or ``train.offload`` takes more memory than there is.
    """
    mesh = config.train.mesh
    if isinstance(mesh, Mesh) and mesh.tensor > 1 and (reason := why_not_split(read_config(folder), mesh.tensor)):
        raise ModelError(f"train.mesh.tensor: {reason}; give another size, or 1")
    if room is None or not config.train.resources.gpus:
        return
    try:
        shape = ModelShape.from_folder(folder)
    except ModelError:
        return
    reason = too_long(config, shape, room, algorithm) or (memory and too_much_offloaded(config, shape, memory))
    if reason:
        raise ResourceError(reason)


def too_long(config: SpinConfig, shape: ModelShape, room: float, algorithm: Planned) -> str | None:
    """Returns an error text if the longest prompt with its responses alone overfills a GPU on every mesh; else None.

    A shorter length is proposed unless the model leaves less of the GPU to tokens than ``FILLED`` of it.
    """
    longest = algorithm.least_pack(config)
    if _beside_shards(config, shape, longest) <= room:
        return None
    sizes = [size for size in TENSOR_SIZES if config.train.lora is None and not shape.why_not_split(size)]
    needed = partial(_beside_shards, config, shape, tensor=max([1, *sizes]))
    if needed(longest) <= room:
        return None
    if (alone := needed(0)) > FILLED * room:
        return (
            f"training: a prompt with its responses, up to {longest} tokens, takes {needed(longest) / GB:.0f} GB on a "
            f"device of {room / GB:.0f} GB, however many workers share the weights; {alone / GB:.0f} GB of them are "
            "needed at any length, for embedding, head and two layers, which each GPU gathers, and for buffers of "
            f"gradients; {_larger(config, shape, longest, room)}"
        )
    fits = bisect_left(range(1, longest), True, key=lambda length: needed(length) > room)
    return (
        f"model.max_length: a prompt with its responses, up to {longest} tokens, takes {needed(longest) / GB:.0f} "
        f"GB beside the weights on a device of {room / GB:.0f} GB; from {fits + 1} tokens on a context-parallel mesh "
        f"would be needed, which spin_ray does not have; lower {_shorter(config, fits, algorithm)}"
    )


def too_much_offloaded(config: SpinConfig, shape: ModelShape, memory: float) -> str | None:
    """Returns an error text if what all workers offload overfills the memory of their only machine; else None."""
    if not config.train.offload:
        return None
    needed = most_offloaded_bytes(config, shape, Mesh())  # of all workers: replicas would make it more
    if needed <= memory:
        return None
    whole = config.sft is not None or config.train.lora is None
    cure = "start from an SFT model (no sft) and train adapters (train.lora)" if whole else "take a smaller model"
    return (
        f"train.offload: weights, gradients and optimizer states take {needed / GB:.0f} GB of this machine's memory, "
        f"which has {memory / GB:.0f}; {cure}, or use a machine with more"
    )


def _beside_shards(config: SpinConfig, shape: ModelShape, length: int, tensor: int = 1) -> float:
    """Returns the bytes of a rank for a pack of ``length`` tokens, without what more workers would make smaller."""
    alone = config.with_train(pack_length=length, gradient_checkpointing=True, sharding="full")
    memory = full_memory(alone, shape, config.train.optimizer, Mesh(shard=2, tensor=tensor))
    return sum(size for purpose, size in memory.items() if purpose not in SHARDED)


def _larger(config: SpinConfig, shape: ModelShape, longest: int, room: float) -> str:
    """Returns what to change if the model leaves no room: the GPUs, or to adapters if they would fit."""
    adapted = config.with_train(lora=LoraConfig())
    fits = config.train.lora is None and _beside_shards(adapted, shape, longest) <= room
    return "take GPUs with more memory" + (", or train adapters (train.lora: {rank: 16})" if fits else "")


def _shorter(config: SpinConfig, fits: int, algorithm: Planned) -> str:
    """Returns what to lower for at most ``fits`` tokens: prompts alone, if they keep as much room as responses."""
    answer = config.generation.sampling.max_tokens

    def longer(length: int) -> bool:
        model = config.model.model_copy(update={"max_length": length})
        return algorithm.least_pack(config.model_copy(update={"model": model})) > fits

    length = bisect_left(range(1, config.model.max_length), True, key=longer)
    if length > answer:
        return f"model.max_length to {length} or less"
    return f"model.max_length and generation.sampling.max_tokens until those are {fits} or fewer"
