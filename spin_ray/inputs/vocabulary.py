"""Tokens without an embedding, e.g. after ``add_tokens`` without ``resize_token_embeddings``.

Such a token would end training with an index error on the device.
"""

from pathlib import Path
from typing import Any

from spin_ray.errors import ModelError
from spin_ray.inputs.model_folder import read_config

_NAMED = 5
"""Tokens that an error names."""


def vocabulary_of(folder: Path) -> int | None:
    """Returns how many tokens the model embeds; None if unknown."""
    config = read_config(folder)
    text = config.get("text_config")
    size = text.get("vocab_size") if isinstance(text, dict) else None
    size = config.get("vocab_size") if size is None else size
    return size if isinstance(size, int) else None


def without_embedding(tokenizer: Any, vocabulary: int | None) -> dict[int, str]:
    """Returns the tokens (id -> name, ascending) whose id is ``vocabulary`` or larger."""
    if vocabulary is None:
        return {}
    return dict(sorted((token_id, name) for name, token_id in tokenizer.get_vocab().items() if token_id >= vocabulary))


def refuse(tokens: dict[int, str], vocabulary: int | None, model: str, user: str) -> None:
    """Raises ModelError if there are ``tokens``, which ``user`` (a template or a row) has."""
    if not tokens:
        return
    names, ids = list(tokens.values()), list(map(str, tokens))
    more = ", …" if len(tokens) > _NAMED else ""
    raise ModelError(
        f"{model}: the tokenizer has tokens ({', '.join(names[:_NAMED])}{more}) that the model has no embedding for "
        f"(ids {', '.join(ids[:_NAMED])}{more} of a vocabulary of {vocabulary}), and {user} has them; save the model "
        "after resize_token_embeddings, or take them out of template and data"
    )
