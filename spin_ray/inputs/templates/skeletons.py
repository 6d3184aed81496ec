"""Skeletons: the text that a template writes around messages, for one sequence of roles."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.templates.copying import copies_texts

Ask = Callable[[Conversation, bool], str | None]
"""Function of messages and ``add_generation_prompt``; returns the rendered text, or None for a refusal."""

_BLANK, _OPEN, _CLOSE = "\u2003", "\ue002", "\ue003"
"""Marks of a text's place; a template that strips removes the blanks."""
_PLACE = re.compile(f"({_BLANK}?){_OPEN}([0-9]+){_CLOSE}({_BLANK}?)")
_MOST = 4096


@dataclass(frozen=True, slots=True)
class _Skeleton:
    words: str
    """Format for ``%`` with one ``%s`` per place."""
    places: tuple[tuple[int, bool], ...]
    """For each place, the message's index and whether its text is stripped."""

    def around(self, messages: Conversation) -> str:
        texts = [messages[index]["content"] for index, _ in self.places]
        return self.words % tuple(
            [text.strip() if stripped else text for text, (_, stripped) in zip(texts, self.places, strict=True)]
        )


class Skeletons:
    """Skeletons of one template, one per sequence of roles seen so far."""

    def __init__(self, ask: Ask | None) -> None:
        self._ask = ask
        self._known: dict[tuple[tuple[str, bool, int], ...], tuple[_Skeleton, _Skeleton] | None] = {}

    @classmethod
    def of(cls, template: Any, ask: Ask) -> "Skeletons":
        """Returns the skeletons of ``template``; a dict of named templates is always run."""
        return cls(ask if isinstance(template, str) and copies_texts(template) else None)

    def write(self, messages: Conversation) -> tuple[str, str] | None:
        """Returns the prompt and the text behind it; None if the template must be run."""
        if self._ask is None:
            return None
        roles = tuple([(message["role"], not message["content"], len(message)) for message in messages])
        if roles not in self._known:
            if len(self._known) >= _MOST or any(len(message) > 2 for message in messages):  # other keys may matter
                return None
            self._known[roles] = _learn(messages, self._ask)
        known = self._known[roles]
        return known and (known[0].around(messages), known[1].around(messages))


def _learn(messages: Conversation, ask: Ask) -> tuple[_Skeleton, _Skeleton] | None:
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
    split = _PLACE.split(text)
    words: Sequence[str] = split[::4]
    befores, numbers, afters = split[1::4], split[2::4], split[3::4]
    if befores != afters or any(character in part for part in words for character in (_BLANK, _OPEN, _CLOSE)):
        return None
    return _Skeleton(
        "%s".join(part.replace("%", "%%") for part in words),
        tuple((int(number), not before) for number, before in zip(numbers, befores, strict=True)),
    )
