"""Server-sent events of a streamed answer."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "[DONE]"


class HeldStream(StreamingResponse):
    """A stream that frees its place and engine request however it ends, even unread."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


def rewrite(events: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Applies ``change`` to the object of each of the whole ``events``."""
    told = [event.removeprefix("data: ").strip() for event in events.split("\n\n") if event.strip()]
    changed = [data if data == DONE else json.dumps(change(json.loads(data))) for data in told]
    return "".join(f"data: {data}\n\n" for data in changed)
