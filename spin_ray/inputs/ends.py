"""Tokens that end a turn besides the chat template's, e.g. ``<|end_of_text|>`` besides ``<|eot_id|>``."""

from pathlib import Path
from typing import Any

from spin_ray.inputs.rendering import ChatRenderer
from spin_ray.learner.published import ends_of, read_json


def other_ends(folder: Path, renderer: ChatRenderer) -> tuple[int, ...]:
    """Returns the ids that model folder and tokenizer name, ascending, without the template's."""
    return tuple(sorted(named_ends(folder, renderer.tokenizer) - {renderer.end_of_turn_id}))


def named_ends(folder: Path, tokenizer: Any) -> set[int]:
    """Returns the ids that model folder and tokenizer name.

    An id in the folder's files that is no added token is ignored as a mistake.
    """
    named = {tokenizer.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        content = read_json(folder / file)
        for scope in (content, content.get("text_config")):
            named |= {*ends_of(scope)} if isinstance(scope, dict) else set()
    return {end for end in named - {None} if end in tokenizer.added_tokens_decoder or end == tokenizer.eos_token_id}
