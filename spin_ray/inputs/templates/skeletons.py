"""Skeletons: what a chat template writes around the texts of a conversation, asked once for each sequence of roles.

A template that copies texts as they are (``copies_texts``) writes the same words around them for all conversations that
have the same roles and the same empty texts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.templates.copying import copies_texts

Ask = Callable[[Conversation, bool], str | None]
"""``ask(messages, add_generation_prompt)`` returns what the template writes, or None if it refuses the messages."""

_BLANK, _OPEN, _CLOSE = "\u2003", "\ue002", "\ue003"
"""Private-use characters that mark the place of a text. The blanks around a mark are gone where a template strips."""
_PLACE = re.compile(f"({_BLANK}?){_OPEN}([0-9]+){_CLOSE}({_BLANK}?)")
_MOST = 4096
"""Sequences of roles that are remembered. The template is run for conversations of further ones."""


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """Words of the template with places for texts."""

    words: str
    """A format for ``%`` with one ``%s`` a place."""
    places: tuple[tuple[int, bool], ...]
    """For each place the index of the message whose text stands there, and True if the text is stripped."""

    def around(self, messages: Conversation) -> str:
        texts = [messages[index]["content"] for index, _ in self.places]
        return self.words % tuple(
            [text.strip() if stripped else text for text, (_, stripped) in zip(texts, self.places, strict=True)]
        )


class Skeletons:
    """Skeletons of one template by sequences of roles, learnt when such a sequence first comes."""

    def __init__(self, ask: Ask | None) -> None:
        """Takes a template that copies texts; None for one that must always be run."""
        self._ask = ask
        self._known: dict[tuple[tuple[str, bool, int], ...], tuple[_Skeleton, _Skeleton] | None] = {}

    @classmethod
    def of(cls, template: Any, ask: Ask) -> "Skeletons":
        """Reads ``template``. A dict of named templates, which transformers allows, is always run."""
        return cls(ask if isinstance(template, str) and copies_texts(template) else None)

    def write(self, messages: Conversation) -> tuple[str, str] | None:
        """Returns the prompt, and what follows it with the last message.

        The prompt is all but the last message, and the words that ask for it. None: run the template, as its words do
        not follow from the roles.
        """
        if self._ask is None:
            return None
        roles = tuple([(message["role"], not message["content"], len(message)) for message in messages])
        if roles not in self._known:
            if len(self._known) >= _MOST or any(len(message) > 2 for message in messages):  # a key that may hold more
                return None
            self._known[roles] = _learn(messages, self._ask)
        known = self._known[roles]
        return known and (known[0].around(messages), known[1].around(messages))


def _learn(messages: Conversation, ask: Ask) -> tuple[_Skeleton, _Skeleton] | None:
    """Returns the skeletons of the prompt and of what follows it; None if the template does more than to copy marks."""
    marked = [
        message | {"content": f"{_BLANK}{_OPEN}{number}{_CLOSE}{_BLANK}" if message["content"] else ""}
        for number, message in enumerate(messages)
    ]
    prompt, whole = ask(marked[:-1], True), ask(marked, False)
    if prompt is None or whole is None or not whole.startswith(prompt):
        return None
    before, after = _skeleton(prompt), _skeleton(whole[len(prompt) :])
    return (before, after) if before and after else None


def _skeleton(text: str) -> _Skeleton | None:
    """Finds the marks in ``text``; None if the template did something else with one than to write or to strip it."""
    split = _PLACE.split(text)
    words: Sequence[str] = split[::4]
    befores, numbers, afters = split[1::4], split[2::4], split[3::4]
    if befores != afters or any(character in part for part in words for character in (_BLANK, _OPEN, _CLOSE)):
        return None
    return _Skeleton(
        "%s".join(part.replace("%", "%%") for part in words),
        tuple((int(number), not before) for number, before in zip(numbers, befores, strict=True)),
    )
