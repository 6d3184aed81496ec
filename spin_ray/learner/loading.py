"""Loading in shards: no rank holds the whole model in fp32 (280 GB for 70B parameters)."""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.filesystem import FileSystem
from transformers import AutoConfig, AutoModelForCausalLM

from spin_ray.learner.decoder import layer_stack, layers_of_every_kind
from spin_ray.learner.fused import read_parts, stored_parts, stored_targets
from spin_ray.learner.hf_folder import first_attention, load_model
from spin_ray.learner.weights import tensor_shapes, weight_files


def empty_model(source: Path) -> Any | None:
    """Builds the causal LM with parameters on the meta device.

    Returns None if the model must be loaded whole, because transformers converts weights by rules that ``fused`` lacks.
    """
    model = on_meta(AutoConfig.from_pretrained(source))
    stored = tensor_shapes(source)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in _stored_buffers(model).items()}
    as_stored = {name for name, shape in shapes.items() if stored.get(name) == shape}
    if not shapes.keys() <= as_stored | stored_parts(model, stored).keys():
        return None
    return model.eval()


def on_meta(config: Any, kind: Any = AutoModelForCausalLM, attention: str | None = None) -> Any:
    """Builds the model with parameters on the meta device."""
    attention = attention or first_attention(config)
    with _parameters_on_meta():
        return kind.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)


def _stored_buffers(model: Any) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def missing_weights(source: Path, kind: Any = AutoModelForCausalLM) -> list[str]:
    """Returns the weights that the folder lacks and transformers would initialise randomly.

    Returns none if transformers splits stored weights or does not know the model.
    """
    try:
        model = on_meta(AutoConfig.from_pretrained(source), kind, "eager")  # some classifiers have no other
    except Exception:  # loading the folder raises the same error later
        return []
    found = stored_targets(model, tensor_shapes(source))
    if found is None:
        return []
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)  # tied parameters are stored once, under any of their names
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    return sorted(
        tied[0] for tied in names.values()
        if found.isdisjoint(tied) and not any(pattern.search(name) for pattern in ignored for name in tied)
    )  # fmt: skip


def read_shares(parameters: dict[str, nn.Parameter], source: Path, model: Any) -> None:
    """Fills ``model``'s sharded parameters and stored buffers; a collective."""
    parts = stored_parts(model, tensor_shapes(source))
    tensors = {name: parameter.detach() for name, parameter in parameters.items()} | _stored_buffers(model)
    read_parts({name: tensors.pop(name) for name in parts.keys() & tensors.keys()}, parts, source)
    reader = HuggingFaceStorageReader(str(source))
    reader.fs = _WeightFiles()
    dcp.load(tensors, storage_reader=reader)


class _WeightFiles(FileSystem):
    """The files that transformers loads from a folder, e.g. not ``consolidated.safetensors``."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in weight_files(Path(path))]


def load_first_layers(source: Path) -> Any:
    """Loads the first layers, at least two and one of every kind, for the probe."""
    config = AutoConfig.from_pretrained(source)
    keep_layers(config, layers_of_every_kind(on_meta(config)))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would report every layer that is left out
    try:
        return load_model(source, trust_remote_code=False, config=config)
    finally:
        transformers.logging.set_verbosity(verbosity)


def first_layers(model: Any) -> Any:
    """Returns a copy of the model with its first layers, at least two and one of every kind.

    Modules and buffers may be changed. Parameters share memory with ``model``.
    """
    wanted = layers_of_every_kind(model)
    others = {id(it): nn.Parameter(it.detach(), requires_grad=it.requires_grad) for it in model.parameters()}
    others |= {id(layer): nn.Identity() for layer in layer_stack(model)[wanted:]}
    copied = copy.deepcopy(model, others)
    keep_layers(copied.config, wanted)
    del layer_stack(copied)[wanted:]
    return copied


def as_eager(model: Any) -> Any:
    """Builds a model with eager attention around ``model``'s weights.

    Some families choose layer classes at construction, so that a later switch changes nothing.
    ALiBi models get SDPA: Falcon's eager attention adds ALiBi twice (transformers 5.19).
    """
    config = copy.deepcopy(model.config)
    attention = "sdpa" if getattr(config, "alibi", False) else "eager"
    with _parameters_on_meta():
        made = type(model)._from_config(config, attn_implementation=attention)
    made.load_state_dict(model.state_dict(), assign=True)
    return made.eval()


def keep_layers(config: Any, wanted: int) -> None:
    """Cuts the config to ``wanted`` layers."""
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # layer_types and its like
            setattr(text, name, value[:wanted])
    text.num_hidden_layers = wanted


def materialise(module: nn.Module, device: torch.device, parameters_on: torch.device) -> None:
    """Allocates meta parameters; buffers keep their values, unlike with ``to_empty``."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=parameters_on)
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value.to(device))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Puts new parameters on the meta device, in all threads.

    ``torch.device("meta")`` would also take buffers, which no file holds.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            kept: Tensor = module._parameters[name]  # type: ignore[assignment]
            module._parameters[name] = nn.Parameter(kept.to("meta"), requires_grad=kept.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
