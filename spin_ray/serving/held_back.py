"""The end of a prompt that its token ids leave to the response: a model says it, and a client must not hear it.

``inputs/rendering.py`` has the reason: a tokenizer may join the end of a prompt to the beginning of a response.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from spin_ray.serving.engines import Item
from spin_ray.serving.events import rewrite


async def without_held_back(pieces: AsyncGenerator[Item, None], held_back: str) -> AsyncGenerator[Item, None]:
    """Yields the pieces of a chat completion, streamed or whole, without ``held_back`` where a text begins with it.

    A text that begins otherwise stays as it is. Closing this generator closes ``pieces``.
    """
    answer = _Answer(held_back)
    async with aclosing(pieces):
        async for piece in pieces:
            yield rewrite(piece, answer.event) if isinstance(piece, str) else answer.whole(piece)


class _Answer:
    """The choices of one chat completion, each without ``held_back``."""

    def __init__(self, held_back: str) -> None:
        self._beginnings: defaultdict[int, _Beginning] = defaultdict(lambda: _Beginning(held_back))

    def event(self, told: dict[str, Any]) -> dict[str, Any]:
        """Returns one event of a stream; its text may be empty while the beginning is still open."""
        for choice in told.get("choices", ()):
            delta, ended = choice["delta"], choice.get("finish_reason") is not None
            text = self._beginnings[choice["index"]].pass_on(delta.get("content") or "", ended)
            if text or "content" in delta:
                delta["content"] = text
        return told

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        """Returns a completion that was not streamed, or an error as it is."""
        for choice in told.get("choices", ()):
            if text := choice["message"].get("content"):
                choice["message"]["content"] = self._beginnings[choice["index"]].pass_on(text, ended=True)
        return told


class _Beginning:
    """The beginning of a text, kept until it has all of ``held_back`` or differs from it."""

    def __init__(self, held_back: str) -> None:
        self._held_back, self._kept, self._is_open = held_back, "", True

    def pass_on(self, text: str, ended: bool) -> str:
        """Returns the text that may go out now that ``text`` has come; all that is kept once the text has ended."""
        if not self._is_open:
            return text
        self._kept += text
        if not ended and self._kept != self._held_back and self._held_back.startswith(self._kept):
            return ""
        self._is_open = False
        return self._kept.removeprefix(self._held_back)
