"""Limits of a request's head, its line and headers, before any key is read: uvicorn sets none."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from spin_ray.serving.errors import Refusal

LONGEST_HEAD = 2**16
"""Most bytes of a head, as far as it came without its end."""
HEAD_S = 30.0
"""Longest time from a head's first byte, or from the connection, to its end, in seconds."""


class LimitedHeads(HttpToolsProtocol):
    """A connection that is closed with 431 after too long a head, and with 408 after too slow a one.

    One on which nothing has come is closed without words: browsers open some in advance and show what they find there.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_in_head, self._length, self._piece = False, 0, 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, self._give_up, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._piece = len(data)
        super().data_received(data)
        self._length += len(data)
        if self._is_in_head and self._length > LONGEST_HEAD:
            self._give_up(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._timer = self._timer or self.loop.call_later(HEAD_S, self._give_up, 408)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._length = -self._piece  # what this piece has of the next head is not counted
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, status: int) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete  # words would garble the answer
        if self._is_in_head and not is_answering:
            limit = f"{LONGEST_HEAD} bytes" if status == 431 else f"{HEAD_S:g} s"
            response = Refusal(status, f"The request's line and headers took more than {limit}").response()
            head = [STATUS_LINE[status], b"connection: close\r\n"]
            head += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
            self.transport.write(b"".join([*head, b"\r\n", bytes(response.body)]))
        self.transport.close()
