"""Tokens without an embedding, e.g. after ``add_tokens`` without ``resize_token_embeddings``.

Such a token would end training with an index error on the device.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from spin_ray.errors import ModelError
from spin_ray.inputs.model_folder import read_config

_NAMED = 5


def vocabulary_of(folder: Path) -> int | None:
    """Returns the number of tokens that the model embeds; None if unknown."""
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


def warn_of(tokens: dict[int, str]) -> str | None:
    """Returns a warning about ``tokens``; None if there are none."""
    if not tokens:
        return None
    return (
        f"the model has no embedding for {len(tokens)} tokens of its tokenizer ({_some(tokens.values())}); rows with "
        "one go to quarantine"
    )


def _some(names: Iterable[str]) -> str:
    first = list(islice(names, _NAMED + 1))
    return ", ".join([*first[:_NAMED], *(["…"] if len(first) > _NAMED else [])])


def refuse(tokens: dict[int, str], vocabulary: int | None, model: str, user: str) -> None:
    """Raises ModelError if there are ``tokens``; ``user`` is the template or row that has them."""
    if not tokens:
        return
    names, ids = _some(tokens.values()), _some(map(str, tokens))
    raise ModelError(
        f"{model}: the tokenizer has tokens ({names}) that the model has no embedding for "
        f"(ids {ids} of a vocabulary of {vocabulary}), and {user} has them; save the model "
        "after resize_token_embeddings, or take them out of template and data"
    )
