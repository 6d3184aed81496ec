"""Pieces of a streamed answer, through a layer of the server."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from spin_ray.serving.engines import Item

Pieces = AsyncGenerator[Item, None]


def pieces_through(layer: Callable[[Pieces], Pieces], pieces: list[Item]) -> list[Item]:
    """Returns the pieces that leave ``layer``."""

    async def said() -> Pieces:
        for piece in pieces:
            yield piece

    async def gathered() -> list[Item]:
        return [piece async for piece in layer(said())]

    return asyncio.run(gathered())
