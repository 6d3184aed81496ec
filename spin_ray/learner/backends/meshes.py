"""The mesh of the ranks, for FSDP2 and tensor parallelism.

    replicate × shard   fully_shard: weights are gathered within ``shard``, gradients summed over both
    tensor              parallelize_module: heads and columns of every layer, by transformers' plan

Embeddings, head and plain norms stay whole; the ranks of a tensor group compute them from equal bits.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from spin_ray.config.sections import Mesh
from spin_ray.errors import ConfigError, ModelError
from spin_ray.learner.loading import first_layers
from spin_ray.learner.tensor_plan import STYLES, Style, layer_plan, why_not_split


def _norm_of_local_heads() -> ParallelStyle:
    """Returns the style of norms that run on local heads, with gradients summed over all heads."""
    # Sequence parallelism over the heads does so; the number of the dimension makes no difference.
    return SequenceParallel(sequence_dim=2, use_local_output=True)


_PARALLEL: dict[Style, Callable[[], ParallelStyle]] = {
    "columns": ColwiseParallel,
    "gathered columns": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rows": RowwiseParallel,
    "rows of whole inputs": lambda: RowwiseParallel(input_layouts=Replicate()),
    "norm of local heads": _norm_of_local_heads,
}


def make_mesh(wanted: Mesh | None, device: torch.device) -> DeviceMesh:
    """Returns the mesh of all ranks: ``shard``, and other dimensions larger than 1.

    Raises:
        ConfigError: the mesh has another number of ranks.
    """
    world = dist.get_world_size()
    wanted = wanted or Mesh(shard=world)
    if wanted.ranks != world:
        raise ConfigError(f"train.mesh: {wanted} has {wanted.ranks} ranks for {world} workers; use train.mesh: auto")
    sizes = {name: size for name, size in wanted.model_dump().items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the dimensions over which packs are distributed."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")
    return mesh[names]


def split_layers(model: Any, mesh: DeviceMesh) -> None:
    """Splits each layer over the ``tensor`` dimension, if there is one.

    Raises:
        ModelError: the model cannot be split.
    """
    if "tensor" not in (mesh.mesh_dim_names or ()):
        return
    text, group = model.config.get_text_config(), mesh["tensor"]
    if reason := why_not_split(text.to_dict(), group.size()):
        raise ModelError(f"train.mesh.tensor: {reason}; {_whole_layers()}")
    if partial := sorted(parameters_beside_the_plan(model)):
        raise ModelError(
            f"train.mesh.tensor: transformers' tensor plan for a model of type {text.model_type} leaves out "
            f"{', '.join(partial)}, whose gradients would be those of one rank's heads; {_whole_layers()}"
        )
    styles = {name: _PARALLEL[STYLES[style]]() for name, style in layer_plan(text).items()}
    parallelize_module(model.get_decoder(), group, styles, src_data_rank=None)


def _whole_layers() -> str:
    return f"use train.mesh: {{shard: {dist.get_world_size()}}}"


def parameters_beside_the_plan(model: Any) -> set[str]:
    """Returns parameters in split blocks (attention, MLP) that the plan does not name."""
    plan = layer_plan(model.config.get_text_config())
    split = {name.rpartition(".")[0] for name, style in plan.items() if style == "colwise"}
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.get_decoder().named_parameters()}
    within = {name for name in names if any(name.startswith(f"{parent}.") for parent in split)}
    return {name for name in within if name.rpartition(".")[0] not in plan}


@torch.no_grad()
def check_split(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Compares the first layers' log-probabilities, split and whole; a collective.

    Raises:
        ModelError: they differ, or the model cannot be split.
    """
    if "tensor" not in (mesh.mesh_dim_names or ()):
        return
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[(7 * i + 3) % vocabulary for i in range(24)]], device=device)

    def logps(copied: Any) -> Tensor:
        return copied.to(device).eval()(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    expected = logps(first_layers(model))
    split = first_layers(model)
    split_layers(split, mesh)
    try:
        found = logps(split)
    except RuntimeError as error:
        raise ModelError(
            f"train.mesh.tensor: {type(model).__name__} cannot be split ({error}); {_whole_layers()}"
        ) from error
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
        apart = (found - expected).abs().max()
        raise ModelError(
            f"train.mesh.tensor: {type(model).__name__} gives log-probabilities that are {apart:.2g} nats off when its "
            f"layers are split; {_whole_layers()}"
        )


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by mesh, as torch's operations on lists take one mesh only."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def group_by_mesh(optimizer: Optimizer) -> None:
    """Splits the optimizer's groups so that each has parameters of one mesh.

    Changes the list and its groups in place, because an optimizer may keep references to them.
    """
    for group in list(optimizer.param_groups):
        group["params"], *others = by_mesh(group["params"])
        optimizer.param_groups += [group | {"params": parameters} for parameters in others]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all gradients, the same on every rank; a collective."""
    norms = [torch.nn.utils.get_total_norm(group, foreach=True) for group in by_mesh(gradients)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    for group in by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, most, norm, foreach=True)
