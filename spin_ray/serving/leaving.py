"""Clients that hang up before their answer has begun."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.types import Receive

from spin_ray.serving.errors import Refusal


@asynccontextmanager
async def while_listened_to(request: Request) -> AsyncIterator[None]:
    """Cancels the block when the client hangs up. The request's body must have been read.

    Raises:
        Refusal: the client has hung up (499); nobody but the access log hears of it.
    """
    limit = asyncio.timeout(None)
    try:
        async with limit:
            watch = asyncio.create_task(_end_when_left(request.receive, limit))
            try:
                yield
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
    except TimeoutError:
        if limit.expired():
            raise Refusal(499, "The client hung up before its answer began") from None
        raise


async def _end_when_left(receive: Receive, limit: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(asyncio.get_running_loop().time())
