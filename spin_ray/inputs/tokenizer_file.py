"""The tokens of a folder's tokenizer.json beside those of the class that transformers loads.

A class such as ``LlamaTokenizer`` is built anew from the vocabulary. Where tokenizer.json is of another kind, such as
the byte-level ones of DeepSeek R1's distillates, the class loses line breaks without a word.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spin_ray.errors import ModelError, first_line

_PROBE = "Hello, what is 12 + 3?\n\n  - é 中文 😀\tend."


def refuse_lost_text(tokenizer: Any, folder: Path) -> None:
    """Raises ModelError if the loaded class fails, or loses text that tokenizer.json keeps."""
    if (own := _own(tokenizer, folder)) is None:
        return
    loaded, name = tokenizer.backend_tokenizer, type(tokenizer).__name__
    cure = "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
    try:
        lost = _keeps(own) and not _keeps(loaded)
    except Exception as error:  # the tokenizers library raises no narrower type
        raise ModelError(f"{folder}: its tokenizer fails as a {name} ({first_line(error)}); {cure}") from error
    if lost:
        raise ModelError(
            f"{folder}: transformers loads its tokenizer as a {name}, which loses text that tokenizer.json keeps (line "
            f"breaks or blanks); {cure}"
        )


def warn_of_other_tokens(tokenizer: Any, folder: Path) -> str | None:
    """Returns a sentence if tokenizer.json makes other tokens of a text than the loaded class."""
    if (own := _own(tokenizer, folder)) is None:
        return None
    marks = [str(token) for token in own.get_added_tokens_decoder().values() if token.special]
    for text in (_PROBE, *(mark + _PROBE for mark in marks[:1])):
        if _ids(own, text) != _ids(tokenizer.backend_tokenizer, text):
            return (
                f"transformers loads the tokenizer as a {type(tokenizer).__name__}, which makes other tokens of some "
                "texts than tokenizer.json; if the model learnt those, set tokenizer_class to PreTrainedTokenizerFast "
                "in tokenizer_config.json"
            )
    return None


def _own(tokenizer: Any, folder: Path) -> Tokenizer | None:
    """Returns the tokenizer of tokenizer.json; None without one."""
    if not tokenizer.is_fast or not (folder / "tokenizer.json").is_file():
        return None
    try:
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # transformers reads what this version of the library does not
        return None
    own.no_truncation()
    own.no_padding()
    return own


def _keeps(tokenizer: Tokenizer) -> bool:
    return tokenizer.decode(_ids(tokenizer, _PROBE), skip_special_tokens=False).strip() == _PROBE


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
