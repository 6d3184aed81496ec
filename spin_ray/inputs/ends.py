"""Tokens that end a turn besides the chat template's, e.g. ``<|end_of_text|>`` besides ``<|eot_id|>``."""

import json
from pathlib import Path
from typing import Any

from spin_ray.inputs.rendering import ChatRenderer


def other_ends(folder: Path, renderer: ChatRenderer) -> tuple[int, ...]:
    """Returns the ids that model folder and tokenizer name, ascending, without the template's."""
    return tuple(sorted(named_ends(folder, renderer.tokenizer) - {renderer.end_of_turn_id}))


def named_ends(folder: Path, tokenizer: Any) -> set[int]:
    """Returns the ids that model folder and tokenizer name.

    An id in the folder's files that is no added token is ignored as a mistake.
    """
    named = {tokenizer.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for scope in (content, content.get("text_config")):
            ends = scope.get("eos_token_id") if isinstance(scope, dict) else None
            named |= {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
    return {end for end in named - {None} if end in tokenizer.added_tokens_decoder or end == tokenizer.eos_token_id}
