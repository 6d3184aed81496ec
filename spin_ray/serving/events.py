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
