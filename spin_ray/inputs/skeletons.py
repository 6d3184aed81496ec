"""What a chat template writes around the texts of a conversation, asked once for each sequence of roles.

For templates that leave texts alone (``templates.leaves_texts_alone``): what they write is then the same for all
conversations with the same roles and the same empty texts, but for the texts themselves.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spin_ray.inputs.conversations import Conversation

_BLANK, _OPEN, _CLOSE = "\u2003", "\ue002", "\ue003"
"""A text's place is marked with private-use characters between blanks, which are gone where a template strips."""
_PLACE = re.compile(f"({_BLANK}?){_OPEN}([0-9]+){_CLOSE}({_BLANK}?)")
_MOST = 4096
"""Sequences of roles that are kept; conversations of more kinds ask the template."""


@dataclass(frozen=True, slots=True)
class _Written:
    """Words of the template with places for texts."""

    words: str
    """For ``%``."""
    places: tuple[tuple[int, bool], ...]
    """For each place: whose message's text, and whether it is stripped."""

    def around(self, messages: Conversation) -> str:
        texts = [messages[index]["content"] for index, _ in self.places]
        return self.words % tuple(
            [text.strip() if stripped else text for text, (_, stripped) in zip(texts, self.places, strict=True)]
        )


class Skeletons:
    """``ask(messages, add_generation_prompt)`` gives what the template writes, or None if it refuses the messages."""

    def __init__(self, ask: Callable[[Conversation, bool], str | None]) -> None:
        self._ask = ask
        self._known: dict[tuple[tuple[str, bool, int], ...], tuple[_Written, _Written] | None] = {}

    def write(self, messages: Conversation) -> tuple[str, str] | None:
        """The prompt (all but the last message, and what asks for the next), and what follows it with the last message.

        None: it does not follow from the roles, so the template must be asked.
        """
        roles = tuple([(message["role"], not message["content"], len(message)) for message in messages])
        if roles not in self._known:
            if len(self._known) >= _MOST or any(len(message) > 2 for message in messages):  # a key that may hold more
                return None
            self._known[roles] = self._learn(messages)
        known = self._known[roles]
        return known and (known[0].around(messages), known[1].around(messages))

    def _learn(self, messages: Conversation) -> tuple[_Written, _Written] | None:
        marked = [
            message | {"content": f"{_BLANK}{_OPEN}{number}{_CLOSE}{_BLANK}" if message["content"] else ""}
            for number, message in enumerate(messages)
        ]
        prompt, whole = self._ask(marked[:-1], True), self._ask(marked, False)
        if prompt is None or whole is None or not whole.startswith(prompt):
            return None
        before, after = _places(prompt), _places(whole[len(prompt) :])
        return (before, after) if before and after else None


def _places(text: str) -> _Written | None:
    """None if the template did something else with a mark than to write or to strip it."""
    split = _PLACE.split(text)
    words: Sequence[str] = split[::4]
    befores, numbers, afters = split[1::4], split[2::4], split[3::4]
    if befores != afters or any(character in part for part in words for character in (_BLANK, _OPEN, _CLOSE)):
        return None
    return _Written(
        "%s".join(part.replace("%", "%%") for part in words),
        tuple((int(number), not before) for number, before in zip(numbers, befores, strict=True)),
    )
