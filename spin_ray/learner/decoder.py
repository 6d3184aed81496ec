"""A causal LM's decoder and its layers."""

from typing import Any

from torch import nn


def decoder_of(model: Any) -> Any:
    """Returns the module that makes hidden states; some families' ``get_decoder`` returns the whole model."""
    decoder = model.get_decoder()
    return model.model if decoder is model and hasattr(model, "model") else decoder


def decoder_layers(model: Any) -> list[nn.Module]:
    return list(layer_stack(model))


def layer_stack(model: Any) -> nn.ModuleList:
    """Returns the decoder's longest ``ModuleList``, or an empty one."""
    stacks = (child for child in decoder_of(model).children() if isinstance(child, nn.ModuleList))
    return max(stacks, key=len, default=nn.ModuleList())


def layers_of_every_kind(model: Any) -> int:
    """Returns how many first layers include every kind of layer, at least two.

    A layer's kind is its ``layer_types`` entry, its modules, and their flags and windows.
    """
    layers, config = decoder_layers(model), model.config.get_text_config()
    if not layers:  # the layers are in no ModuleList: keep all
        return config.num_hidden_layers
    named = getattr(config, "layer_types", None) or []
    kinds = [(_seen(layer), *named[number : number + 1]) for number, layer in enumerate(layers)]
    return min(len(layers), max(2, *(1 + kinds.index(kind) for kind in kinds), 2))


def _seen(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((type(module).__name__, *_switches(module)) for module in layer.modules())


def _switches(module: nn.Module) -> list[tuple[str, object]]:
    # flags and windows, but not the layer's number
    return [
        (name, value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and "layer" not in name and name != "training"
        if value is None or isinstance(value, bool | str) or ("window" in name and isinstance(value, int))
    ]
