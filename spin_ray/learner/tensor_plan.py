"""A check whether transformers' tensor plan and torch's parallel styles can split a model."""

from collections.abc import Mapping
from typing import Any, Literal

Style = Literal["columns", "gathered columns", "rows", "rows of whole inputs", "norm of local heads"]
STYLES: dict[str, Style] = {
    "colwise": "columns",
    "colwise_rep": "gathered columns",
    "colwise_gather_output": "gathered columns",
    "rowwise": "rows",
    "rowwise_rep": "rows of whole inputs",
    "rowwise_split_input": "rows of whole inputs",
    "replicated_with_grad_allreduce": "norm of local heads",
}
"""Styles by transformers' names; mixtures of experts and latent attention need others."""
MODULES = frozenset(
    {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "dense", "q_norm", "k_norm")}
    | {f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2", "c_fc", "c_proj")}
)
"""Layer modules known to compute the same on one rank's heads and columns."""
DIVIDED = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "intermediate_size": "columns of the feed-forward network",
}
"""Sizes of a layer that a tensor group shares, by transformers' names."""


def why_not_split(config: Mapping[str, Any], tensor: int) -> str | None:
    """Returns why a model of this config.json cannot be split over ``tensor`` ranks, or None."""
    text = text_config_of(config)
    if text is None:
        kind = config.get("model_type", "")
        return f"transformers does not take this config.json of type {kind!r}, and so has no plan to split the model"
    plan = layer_plan(text)
    if not plan:
        return f"transformers has no tensor plan for a model of type {text.model_type}"
    if unknown := sorted(set(plan.values()) - STYLES.keys()):
        return f"transformers' tensor plan for a model of type {text.model_type} uses {', '.join(unknown)}"
    if unknown := sorted({name.removeprefix("layers.*.") for name in plan} - MODULES):
        return f"transformers' tensor plan for a model of type {text.model_type} splits {', '.join(unknown)}"
    return why_not_divided({what: getattr(text, name, None) for name, what in DIVIDED.items()}, tensor)


def text_config_of(config: Mapping[str, Any]) -> Any | None:
    """Returns transformers' config of the language model in a config.json; None if transformers does not take it."""
    from transformers import AutoConfig  # slow

    try:
        return AutoConfig.for_model(**config).get_text_config()
    except Exception:  # an unknown type, or a value that its class refuses; a start says which
        return None


def why_not_divided(sizes: Mapping[str, int | None], tensor: int) -> str | None:
    """Returns which of a layer's sizes ``tensor`` does not divide, or None. Sizes that are not known pass."""
    for what, count in sizes.items():
        if count and count % tensor:
            return f"{tensor} does not divide the model's {count} {what}"
    return None


def layer_plan(text_config: Any) -> dict[str, str]:
    """Returns the styles of the layers' modules. Embeddings and head stay whole on every rank."""
    plan = getattr(text_config, "base_model_tp_plan", None) or {}
    return {name: style for name, style in plan.items() if not name.startswith(("embed_tokens", "norm"))}
