"""The tokenizer of a folder's tokenizer.json, compared with the class that transformers loads.

A class such as ``LlamaTokenizer`` is rebuilt from the vocabulary alone. If tokenizer.json is of another kind, e.g.
byte-level in DeepSeek R1's distillates, the class silently loses line breaks.
"""

import json
from os.path import commonprefix
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spin_ray.errors import ModelError, first_line

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Class that takes tokenizer.json as it is."""
_PROBE = "Hello, what is 12 + 3?\n\n  - é 中文 😀\tend."
_CURE = (
    "copy the folder (of the hub: hf download NAME --local-dir FOLDER), set tokenizer_class to "
    f"{PLAIN_CLASS} in the copy's tokenizer_config.json, and model.path to the copy"
)


def open_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer from Hugging Face's files.

    With mistral_common, transformers would prefer ``tekken.json``, which has no chat template.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, mistral_format=False)


def as_written(tokenizer: Any, folder: Path) -> Any:
    """Returns ``tokenizer``, or tokenizer.json's own if the class of ``tokenizer`` loses text.

    Raises:
        ModelError: the class loses text and cannot be replaced.
    """
    if _is_plain(type(tokenizer).__name__) or (own := _own(tokenizer, folder)) is None:
        return tokenizer
    if (lost := _why_lost(tokenizer, own)) is None:
        return tokenizer
    if _named(folder).removesuffix("Fast") == type(tokenizer).__name__.removesuffix("Fast"):
        from transformers import PreTrainedTokenizerFast

        found: Any = PreTrainedTokenizerFast.from_pretrained(str(folder))
        if _ids(found.backend_tokenizer, _PROBE) == _ids(own, _PROBE):
            return found
    raise ModelError(f"{folder}: {lost}; {_CURE}")


def name_plain_class(folder: Path) -> None:
    """Writes the plain class into tokenizer_config.json if ``as_written`` takes it, for other programs."""
    if not (folder / "tokenizer.json").is_file() or not (named := _named(folder)) or _is_plain(named):
        return
    try:
        tokenizer = open_tokenizer(folder)
        lost = as_written(tokenizer, folder) is not tokenizer
    except Exception:  # the tokenizer needs its own code, or was refused at the start
        return
    if lost:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8")) | {"tokenizer_class": PLAIN_CLASS}
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def warn_of_other_tokens(tokenizer: Any, folder: Path) -> str | None:
    """Returns a warning if tokenizer.json and the loaded class make different tokens, else None."""
    if (own := _own(tokenizer, folder)) is None:
        return None
    marks = [str(token) for token in own.get_added_tokens_decoder().values() if token.special]
    for text in (_PROBE, *(mark + _PROBE for mark in marks[:1])):
        theirs, ours = (each.encode(text, add_special_tokens=False) for each in (own, tokenizer.backend_tokenizer))
        if theirs.ids != ours.ids:
            start = max(len(commonprefix([theirs.ids, ours.ids])) - 1, 0)
            return (
                f"transformers loads the tokenizer as a {type(tokenizer).__name__}, which makes other tokens of some "
                f"texts than tokenizer.json: of {text!r} {ours.tokens[start:][:5]} in place of "
                f"{theirs.tokens[start:][:5]}; if the model learnt the latter, {_CURE}"
            )
    return None


_SETTINGS = "tokenizer_config.json"


def _named(folder: Path) -> str:
    try:
        return str(json.loads((folder / _SETTINGS).read_text(encoding="utf-8")).get("tokenizer_class") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def _is_plain(name: str) -> bool:
    return name in (PLAIN_CLASS, "TokenizersBackend")


def _why_lost(tokenizer: Any, own: Tokenizer) -> str | None:
    name = type(tokenizer).__name__
    try:
        lost = _keeps(own) and not _keeps(tokenizer.backend_tokenizer)
    except Exception as error:  # the tokenizers library raises no narrower type
        return f"its tokenizer fails as a {name} ({first_line(error)})"
    return f"its tokenizer, loaded as a {name}, loses line breaks or blanks that tokenizer.json keeps" if lost else None


def _own(tokenizer: Any, folder: Path) -> Tokenizer | None:
    if not tokenizer.is_fast or not (folder / "tokenizer.json").is_file():
        return None
    try:
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # transformers may read formats that this library cannot
        return None
    own.no_truncation()
    own.no_padding()
    return own


def _keeps(tokenizer: Tokenizer) -> bool:
    return tokenizer.decode(_ids(tokenizer, _PROBE), skip_special_tokens=False).strip() == _PROBE


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
