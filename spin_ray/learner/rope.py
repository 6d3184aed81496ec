"""Rotary embeddings that change with the length of the sequence."""

from typing import Any


def rope_limit(config: dict[str, Any]) -> int | None:
    """Returns the length beyond which all tokens' rotary embedding changes; None for most models."""
    text = config.get("text_config") or config
    ropes = [text.get("rope_parameters") or text.get("rope_scaling") or {}]
    ropes += [part for part in ropes[0].values() if isinstance(part, dict)]  # one for each kind of layer
    whole = text.get("max_position_embeddings")
    limits = []
    for rope in ropes:
        kind = rope.get("rope_type") or rope.get("type")
        if kind in ("longrope", "su"):
            limits += [scope.get("original_max_position_embeddings") for scope in (rope, text)] + [whole]
        elif kind == "dynamic":
            limits.append(whole)
    return next((limit for limit in limits if limit), None)


def switching(limit: int) -> str:
    """Returns the error text for a ``rope_limit`` below ``model.max_length``."""
    return (
        f"its rotary embedding changes for sequences longer than {limit} tokens; set model.max_length to at most that"
    )
