"""Changes to a model that both backends make."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spin_ray.learner.adapters import is_adapter, merge_adapters, stored_name
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.hf_folder import write_model


def decoder_layers(model: Any) -> list[nn.Module]:
    stacks = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return list(max(stacks, key=len, default=[]))


def recompute_activations(model: Any) -> None:
    """Makes the backward pass recompute each decoder layer.

    Transformers' own switch needs training mode, where dropout is on.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def make_deterministic() -> None:
    """Makes torch choose kernels without atomic sums; call it before the first matrix product on a card."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def store_in_bf16(parameters: Iterable[nn.Parameter]) -> None:
    """Halves the memory of weights that are computed in bf16 and never change; the computation's bits are the same."""
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)


def trainable(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def persistent(model: Any, parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Returns the parameters and buffers that a model folder holds."""
    kept = model.state_dict().keys()
    return [(name, tensor) for name, tensor in chain(parameters, model.named_buffers()) if name in kept]


def export(
    directory: Path,
    model: Any,
    tensors: list[tuple[str, Tensor]],
    gather: Callable[[Tensor], Tensor],
    source: str | Path,
    settings: BackendSettings,
) -> None:
    """Writes a plain Hugging Face folder on rank 0; a collective.

    Args:
        gather: returns a whole tensor on every rank.
    """
    whole = ((name, gather(tensor)) for name, tensor in tensors)
    if dist.get_rank() != 0:
        for _ in whole:
            pass
        return
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    names = {stored_name(name) for name, _ in tensors if not is_adapter(name)}
    if settings.lora is not None:
        whole = merge_adapters(whole, settings.lora)  # before anything is rounded
    weights = ((name, weight.to("cpu", dtype if weight.is_floating_point() else None)) for name, weight in whole)
    write_model(directory, model, names, weights, dtype=dtype, source=source, with_code=settings.trust_remote_code)
