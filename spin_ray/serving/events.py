"""Server-sent events of a streamed answer."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

logger = logging.getLogger("ray.serve")

DONE = "[DONE]"
LAST_EVENTS_S = 5.0
"""Seconds for a client to read the rest: of a stream after ``serving.request_timeout_s``, of a connection's data after
its close."""
ABORT = "spin_ray.abort"
"""ASGI extension: a function that ends the request's connection at once. Ray Serve's proxies have none."""


class HeldStream(StreamingResponse):
    """A stream that frees its place and engine request however it ends, even unread.

    A client that does not read is cut off ``LAST_EVENTS_S`` after ``limit_s``. The access log then says 504.
    """

    def __init__(
        self, events: AsyncIterator[str], held: AsyncExitStack, headers: dict[str, str], limit_s: float
    ) -> None:
        headers = headers | {"X-Accel-Buffering": "no"}  # nginx would hold events back
        super().__init__(_on_one_line(events), media_type="text/event-stream", headers=headers)
        self._held, self._limit_s = held, limit_s + LAST_EVENTS_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                async with asyncio.timeout(self._limit_s):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                scope["state"]["log"]["status"] = 504
                if abort := scope.get("extensions", {}).get(ABORT):
                    abort()
                logger.warning("%s: a client that does not read its stream is cut off", scope["path"])


_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What clients take for the end of a line that split at more than \\n and \\r (``str.splitlines``, httpx)."""


async def _on_one_line(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Escapes ``_LINE_ENDS``, which an engine leaves in its JSON as they are."""
    async for piece in events:
        yield piece if piece.isascii() else piece.translate(_LINE_ENDS)


END = f"data: {DONE}\n\n"


def event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told)}\n\n"


def objects(events: str) -> list[dict[str, Any] | None]:
    """Returns the object of each event in whole ``events``; None stands for ``[DONE]``."""
    told = [each.removeprefix("data:").strip() for each in events.split("\n\n") if each.strip()]
    return [None if data == DONE else json.loads(data) for data in told]


def rewrite(events: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Applies ``change`` to the object of each event in whole ``events``."""
    return "".join(END if told is None else event(change(told)) for told in objects(events))
