"""Changes to a model that both backends make."""

import logging
import os
import socket
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spin_ray.config.compilers import missing_tools
from spin_ray.errors import ModelError
from spin_ray.learner import head
from spin_ray.learner.adapter_folder import write_adapter
from spin_ray.learner.adapters import file_name, is_adapter, merge_adapters, stored_name
from spin_ray.learner.attention.hook import allow_many_graphs, keep_out_of_graphs
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.decoder import decoder_layers
from spin_ray.learner.hf_folder import write_model

logger = logging.getLogger(__name__)


def recompute_activations(model: Any) -> None:
    """Makes the backward pass recompute each decoder layer.

    Transformers' own switch needs training mode, where dropout is on.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compiles(wanted: bool | Literal["auto"], device: torch.device, *, split: bool = False) -> bool:
    """Returns True if layers are to be compiled.

    Args:
        split: layers are split over a tensor group, on which torch 2.13's compiler fails (RecursionError).

    Raises:
        ModelError: ``wanted`` is True, but a compiler or Python's headers are missing, or layers are split.
    """
    if split and wanted is True:
        raise ModelError("train.compile: layers that are split (train.mesh.tensor) cannot be compiled; leave it out")
    if not wanted or split or (wanted == "auto" and device.type == "cpu"):
        return False
    no_triton = device.type == "cuda" and find_spec("triton") is None
    missing = "the package triton" if no_triton else missing_tools(cxx=device.type == "cpu")
    if missing and wanted == "auto":
        host = socket.gethostname()
        logger.warning("train.compile: %s needs %s; training goes on uncompiled, which is slower", host, missing)
    elif missing:
        raise ModelError(f"train.compile: needs {missing}; install it or set train.compile: false")
    return missing is None


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer for any number of tokens; equal layers share a graph.

    Only ``forward`` is compiled, so that FSDP2's hooks stay outside. Recomputation must be added afterwards, as no
    graph may break within it.
    """
    keep_out_of_graphs()
    allow_many_graphs()
    torch._dynamo.config.skip_fsdp_guards = (
        False  # layers of several kinds, e.g. with and without a window, share no graph
    )
    differentiable = any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    for layer in decoder_layers(model):
        compiled = torch.compile(layer.forward, dynamic=True, backend=head.COMPILER)
        layer.forward = partial(_forward_as_in_training, compiled, differentiable)
        differentiable = differentiable or any(parameter.requires_grad for parameter in layer.parameters())


def _forward_as_in_training(
    compiled: Callable[..., Any], differentiable: bool, hidden: Tensor, *others: Any, **named: Any
) -> Any:
    """Calls a compiled layer by the graph of training, even without gradients.

    A graph for inference may fuse, and so round, differently. ``differentiable``: training's ``hidden`` has a gradient.
    """
    if torch.is_grad_enabled():
        return compiled(hidden, *others, **named)
    with torch.enable_grad():
        output = compiled(hidden.detach().requires_grad_(differentiable), *others, **named)
    return output.detach() if isinstance(output, Tensor) else tuple(part.detach() for part in output)


def make_deterministic() -> None:
    """Makes torch use deterministic kernels; call it before the first matrix product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Slow, and nothing reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Else inductor would order sums by its own timings, in each process anew. The setting is thread-local; autograd's
    # thread reads TORCHINDUCTOR_DETERMINISTIC, with which train workers are started.
    torch._inductor.config.deterministic = True


def store_in_bf16(parameters: Iterable[nn.Parameter]) -> None:
    """Stores weights in bf16."""
    for parameter in parameters:
        if not parameter.is_floating_point():  # quantised already
            continue
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
    """Writes a Hugging Face folder, or the adapter alone without ``lora.merge``, on rank 0; a collective."""
    lora, adapter_alone = settings.lora, settings.lora is not None and not settings.lora.merge
    whole = ((name, gather(tensor)) for name, tensor in tensors if is_adapter(name) or not adapter_alone)
    if dist.get_rank() != 0:
        for _, weight in whole:
            # NCCL's watchdog counts from the call. All gathers at once would have to end, with rank 0's whole write
            # between them, within the timeout of one.
            if weight.is_cuda:
                torch.cuda.current_stream(weight.device).synchronize()
        return
    names = {stored_name(name) for name, _ in tensors if not is_adapter(name)}
    if lora is not None and not adapter_alone:
        whole = merge_adapters(whole, lora, model)  # before anything is rounded
    weights = (
        (name, weight.to("cpu", settings.dtype if weight.is_floating_point() else None)) for name, weight in whole
    )
    if lora is not None and adapter_alone:
        named = ((file_name(name), weight) for name, weight in weights)
        write_adapter(directory, named, lora, base=settings.base_name or str(source), source=source)
        return
    write_model(
        directory, model, names, weights, dtype=settings.dtype, source=source, with_code=settings.trust_remote_code
    )
