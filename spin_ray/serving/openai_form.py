"""Changes of vLLM's answers to what OpenAI's reference says."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from spin_ray.serving.engines import Item
from spin_ray.serving.events import rewrite

Change = Callable[[dict[str, Any]], dict[str, Any]]


async def changed(pieces: AsyncGenerator[Item, None], change: Change) -> AsyncGenerator[Item, None]:
    """Applies ``change`` to each object of an answer, streamed or whole; closing it closes ``pieces``."""
    async with aclosing(pieces):
        async for piece in pieces:
            yield rewrite(piece, change) if isinstance(piece, str) else change(piece)


def likeliest(most: int) -> Change:
    """Keeps the ``most`` likeliest tokens of each position of a chat.

    vLLM gives the sampled token a place among them, so it must be asked for one more.
    """

    def change(told: dict[str, Any]) -> dict[str, Any]:
        for choice in told.get("choices", ()):
            for position in (choice.get("logprobs") or {}).get("content") or ():
                tokens = sorted(position.get("top_logprobs", ()), key=lambda token: -token["logprob"])
                position["top_logprobs"] = tokens[:most]
        return told

    return change


def nothing_generated(told: dict[str, Any]) -> dict[str, Any]:
    """Leaves the token out of ``usage`` that vLLM samples, and does not show, after a prompt to be echoed alone."""
    if usage := told.get("usage"):
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return told
