"""Limits of a connection that uvicorn does not set.

They are those of a request's head (URL and headers), before any key is read, and of a client that reads no more.
"""

import asyncio
import sys
import weakref
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from spin_ray.serving.errors import Refusal
from spin_ray.serving.events import ABORT, LAST_EVENTS_S

LONGEST_HEAD = 2**16
"""Most bytes of a head, of trailers, and of data that neither ends a head nor adds to a body."""
HEAD_S = 30.0
"""Longest time from the connection, or from a head's first byte, to the head's end, in seconds."""


class LimitedHeads(HttpToolsProtocol):
    """A connection that is closed with 431 after too long a head, and with 408 after too slow a one.

    A connection without data is closed without a response: browsers open some in advance and would show it.
    Trailers of a chunked body are dropped. Offers of another protocol (``Upgrade``) are ignored. Each request's scope
    has the extension ``ABORT``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_in_head, self._is_offer, self._has_moved = False, False, False
        self._fields, self._waiting = 0, 0
        self._timer: asyncio.TimerHandle | None = None
        self._piece, self._rest = b"", b""

    def connection_made(self, transport: Any) -> None:
        closing: Any = _Closing(transport, self.loop)
        super().connection_made(closing)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_moved, self._rest = False, data
        while self._rest:
            self._piece, self._rest = self._rest, b""
            super().data_received(self._piece)
        self._waiting = 0 if self._has_moved else self._waiting + len(data)
        if self._waiting > LONGEST_HEAD:
            self._give_up(431)

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._fields = True, 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"))
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_offer = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._is_offer:
            self._is_in_head, self._has_moved, self._fields = False, True, 0
            self._stop_timer()
            super().on_headers_complete()
            extensions: Any = {ABORT: partial(_abort, weakref.ref(self.cycle))}  # the request's cycle holds its scope
            self.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        self._has_moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_offer:
            self._has_moved = True
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Parses a request that offers ``h2c``, as Java's client does, again without the offer (RFC 9110, 7.8).

        The parser stops after the head; its error says where the rest begins.
        """
        error = sys.exc_info()[1]
        if not self._is_offer or error is None:
            return
        head = [self.parser.get_method(), b" ", self.url, f" HTTP/{self.parser.get_http_version()}\r\n".encode()]
        head += [name + b": " + value + b"\r\n" for name, value in self.headers if name != b"upgrade"]
        self._rest = b"".join([*head, b"\r\n", self._piece[error.args[0] :]])

    def _count(self, length: int) -> None:
        self._fields += length
        if self._fields > LONGEST_HEAD:
            self._give_up(431)
            raise ValueError("a head that is too long")

    def _start_timer(self) -> None:
        self._timer = self._timer or self.loop.call_later(HEAD_S, self._give_up, 408)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, status: int) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete  # an error would garble that answer
        if status == 408 and is_answering:  # reading may be paused, with the head's end in the socket
            self._start_timer()
            return
        if self._is_in_head and not is_answering:
            limit = f"{LONGEST_HEAD} bytes" if status == 431 else f"{HEAD_S:g} s"
            response = Refusal(status, f"The request's URL and headers took more than {limit}").response()
            head = [STATUS_LINE[status], b"connection: close\r\n"]
            head += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
            self.transport.write(b"".join([*head, b"\r\n", bytes(response.body)]))
        self.transport.close()


def _abort(cycle: weakref.ref[RequestResponseCycle]) -> None:
    if found := cycle():
        found.disconnected = True  # else uvicorn would log that the last event is missing
        found.transport.abort()


class _Closing:
    """A transport that is aborted ``LAST_EVENTS_S`` after ``close``, unless its client has read everything by then."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(LAST_EVENTS_S, self._transport.abort)
