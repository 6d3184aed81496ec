"""Guard against control tokens' names in messages, such as ``<|im_end|>``, which would end the turn.

Markers replace the names while the template renders; then the names are tokenised as text.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from tokenizers import Tokenizer

from spin_ray.errors import ModelError, first_line
from spin_ray.inputs.conversations import Conversation

Tree = TypeVar("Tree")

# Private-use characters: in no template, and set aside themselves where a text has them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class Written(NamedTuple):
    """Text with a numbered marker for each name set aside."""

    text: str
    set_aside: Sequence[str] = ()


class Guard:
    def __init__(self, tokenizer: Any, control: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._control = {name: tokenizer.convert_tokens_to_ids(name) for name in control}
        self._own = any_of(self._control)
        guarded = [*self._control, _OPEN, _CLOSE]
        self._guarded = any_of(guarded)
        self._beginnings = sorted({name[0] for name in guarded})
        # Nobody can write the aliases, as each process has its own. Lower-case letters survive every normaliser.
        # An alias begins and ends like its name: this decides whether a ``single_word`` token matches beside it.
        nonce = secrets.token_hex(8)
        self._aliases = {
            name: f"{name[0].strip()}ꔀ{nonce}x{number}ꔁ{name[-1].strip()}" for number, name in enumerate(self._control)
        }

    def set_aside(self, messages: Conversation, tools: Tree) -> tuple[Conversation, Tree, list[str]]:
        """Replaces names by markers; returns messages, tools and names."""
        if not tools and self._are_plain(messages):  # most conversations
            return messages, tools, []
        names: list[str] = []
        marked: Conversation = [
            message | {key: self._mark_all(value, names) for key, value in message.items() if key != "role"}
            for message in messages
        ]
        return marked, self._mark_all(tools, names), names

    def _are_plain(self, messages: Conversation) -> bool:
        for message in messages:
            if len(message) != 2:
                return False
            for beginning in self._beginnings:
                if beginning in message["content"]:
                    return False
        return True

    def _mark_all(self, tree: Any, names: list[str]) -> Any:
        match tree:
            case str():
                return self._mark(tree, names)
            case dict():
                return {self._mark(str(key), names): self._mark_all(value, names) for key, value in tree.items()}
            case list():
                return [self._mark_all(value, names) for value in tree]
        return tree

    def _mark(self, text: str, names: list[str]) -> str:
        for beginning in self._beginnings:
            if beginning in text:
                break
        else:  # most texts; faster than the expression
            return text

        def marker(match: re.Match[str]) -> str:
            names.append(match.group())
            return f"{_OPEN}{len(names) - 1}{_CLOSE}"

        return self._guarded.sub(marker, text)

    def encode(self, texts: Sequence[Written]) -> list[list[int] | None]:
        """Returns each text's ids, without special tokens: the template writes its own.

        Ids are None if names cannot be encoded as text, e.g. by a slow tokenizer.
        """
        plain = list(dict.fromkeys([text.text for text in texts if not text.set_aside]))  # pairs share their prompts
        ids = dict(zip(plain, self._encode_plain(plain), strict=True))
        return [self._encode_forged(text) if text.set_aside else ids[text.text] for text in texts]

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        backend = self._tokenizer.backend_tokenizer  # transformers' wrapper would take twice the time
        backend.no_truncation()  # tokenizer.json or an earlier call may have set these three
        backend.no_padding()
        backend.encode_special_tokens = False
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:  # the library's own errors have no narrower type, its panics not even Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                name = self._tokenizer.name_or_path
                raise ModelError(f"{name}: its tokenizer fails on a text ({first_line(error)})") from error
            raise

    def _encode_forged(self, written: Written) -> list[int] | None:
        """Encodes names as plain text within their surroundings; returns None if that fails."""
        if not self._tokenizer.is_fast:
            return None
        own = self._own.sub(lambda match: self._aliases[match.group()], written.text)
        text = _MARKER.sub(lambda match: written.set_aside[int(match[1])], own)
        ids = self._aliased.encode(text, add_special_tokens=False).ids
        # Beside a word, a ``single_word`` alias would be text, and its token would be missing.
        known = {*self._control.values()} - {self._tokenizer.unk_token_id}
        expected = [token for name in self._own.findall(written.text) if (token := self._control[name]) in known]
        return ids if [token for token in ids if token in known] == expected else None

    @cached_property
    def _aliased(self) -> Tokenizer:
        """Tokenizer with the same ids, but secret names for the control tokens."""
        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        for token in spec["added_tokens"]:
            token["content"] = self._alias(token["content"])
        model = spec["model"]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._alias(model["unk_token"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._alias(piece): token for piece, token in model["vocab"].items()}
        else:  # Unigram: pieces with their scores
            model["vocab"] = [[self._alias(piece), score] for piece, score in model["vocab"]]
        if model.get("merges"):
            model["merges"] = [merge for merge in model["merges"] if not self._makes_control(merge)]
        aliased = Tokenizer.from_str(json.dumps(spec))
        moved = [name for name, token in self._control.items() if aliased.token_to_id(self._aliases[name]) != token]
        if moved:
            raise ModelError(
                f"{self._tokenizer.name_or_path}: its tokenizer cannot tell the text {moved[0]} from the token"
            )
        return aliased

    def _alias(self, name: str) -> str:
        return self._aliases.get(name, name)

    def _makes_control(self, merge: str | list[str]) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return any(piece in self._control for piece in (left, right, left + right))


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches the longest of ``names``, if any."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
