"""The end of the prompt's text that the model samples itself (``inputs/rendering.py``); clients must not see it."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from spin_ray.serving.engines import Item
from spin_ray.serving.events import rewrite


async def without_held_back(pieces: AsyncGenerator[Item, None], held_back: str) -> AsyncGenerator[Item, None]:
    """Yields a chat completion, streamed or whole, without a leading ``held_back``; closing it closes ``pieces``."""
    answer = _Answer(held_back)
    async with aclosing(pieces):
        async for piece in pieces:
            yield rewrite(piece, answer.event) if isinstance(piece, str) else answer.whole(piece)


class _Answer:
    def __init__(self, held_back: str) -> None:
        self._beginnings: defaultdict[int, _Beginning] = defaultdict(lambda: _Beginning(held_back))

    def event(self, told: dict[str, Any]) -> dict[str, Any]:
        for choice in told.get("choices", ()):
            delta, ended = choice["delta"], choice.get("finish_reason") is not None
            text = self._beginnings[choice["index"]].pass_on(delta.get("content") or "", ended)
            if text or "content" in delta:
                delta["content"] = text
        return told

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        for choice in told.get("choices", ()):
            if text := choice["message"].get("content"):
                choice["message"]["content"] = self._beginnings[choice["index"]].pass_on(text, ended=True)
        return told


class _Beginning:
    """The beginning of a text, kept until it equals ``held_back`` or differs."""

    def __init__(self, held_back: str) -> None:
        self._held_back, self._kept, self._is_open = held_back, "", True

    def pass_on(self, text: str, ended: bool) -> str:
        if not self._is_open:
            return text
        self._kept += text
        if not ended and self._kept != self._held_back and self._held_back.startswith(self._kept):
            return ""
        self._is_open = False
        return self._kept.removeprefix(self._held_back)
