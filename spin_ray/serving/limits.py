"""ASGI layers around the routes."""

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spin_ray.config.sections import ServingConfig
from spin_ray.serving.access import LOOPBACK, Key, Rates, find_key
from spin_ray.serving.errors import Refusal, own_error
from spin_ray.serving.metrics import Metrics

access_log = logging.getLogger("ray.serve.spin_ray.access")

ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/compare", "/v1/battles")
"""Routes that need a place in ``Slots``."""
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
]


_LONGEST_ID = 128
_REQUEST_ID = re.compile(rf"[\w.:@/+=-]{{1,{_LONGEST_ID}}}", re.ASCII)
"""Form of an accepted ``X-Request-ID``."""


class Observe:
    """The outermost layer: security headers, request id, one log line per request, a body for a 500, HEAD as GET.

    Routes add to the line through ``scope["state"]["log"]``. Ray Serve's proxies (``proxied``) return the id.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, proxied: bool = False) -> None:
        self._app, self._metrics, self._proxied = app, metrics, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = _request_id(scope, proxied=self._proxied)
        line: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "request_id": request_id}
        headers = _HEADERS if self._proxied else [*_HEADERS, (b"x-request-id", request_id.encode())]
        scope.setdefault("state", {})["log"] = line
        is_head = scope["method"] == "HEAD"
        if is_head:  # in a copy: the server must see HEAD, to send no body
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers]
            elif is_head and "body" in message:
                message["body"] = b""
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logging.getLogger("ray.serve").exception("%s failed", scope["path"])
            if "status" not in line:
                await own_error().response()(scope, receive, send_with_headers)
        finally:
            line["seconds"] = round(time.monotonic() - started, 4)
            line.setdefault("status", 499)  # the client hung up
            if scope["path"] not in ("/healthz", "/readyz"):
                access_log.info(json.dumps(line))
            self._metrics.answered(str(line.get("model", "")), line["status"], line["seconds"])


def _request_id(scope: Scope, *, proxied: bool) -> str:
    """Returns the client's id if it is harmless, or if a proxy returns it anyway; else a fresh id."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given[:_LONGEST_ID] if _REQUEST_ID.fullmatch(given) or (proxied and given) else uuid.uuid4().hex


class Access:
    """The layer of keys and rates for ``/v1``: 401 without a known key, 429 above its rate.

    Routes find the key in ``scope["state"]["key"]``; it is None on a server without keys. There, a request whose
    ``Host`` is not this machine gets 403.
    """

    def __init__(self, app: ASGIApp, config: ServingConfig, keys: list[Key]) -> None:
        self._app, self._config, self._keys, self._rates = app, config, keys, Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                if not self._keys:
                    _check_host(scope)
                if scope["path"].startswith("/v1"):
                    self._check(scope)
            except Refusal as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        name, rate, key = "", self._config.requests_per_minute, None
        if self._keys:
            key = find_key(self._keys, dict(scope["headers"]).get(b"authorization"))
            if key is None:
                raise Refusal(401, "Give a known key as `Authorization: Bearer KEY`", code="invalid_api_key")
            name, rate = key.name, key.per_minute or rate
            scope["state"]["log"]["key"] = name
        scope["state"]["key"] = key
        wait_s = self._rates.wait_s(name, rate) if rate else 0.0
        if wait_s:
            raise Refusal(
                429, f"More than {rate} requests a minute", code="rate_limit_exceeded", retry_s=math.ceil(wait_s)
            )


def _check_host(scope: Scope) -> None:
    """Refuses other sites whose name was made to point at this machine (DNS rebinding)."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if name.strip("[]").lower() not in (*LOOPBACK, ""):
        raise Refusal(403, "Host: is not this machine's; without keys only localhost and 127.0.0.1 are answered")


class WholeBody:
    """The layer that reads the body: 413 if too large, 408 if too slow, 503 unread if no place is free."""

    def __init__(self, app: ASGIApp, config: ServingConfig, slots: "Slots") -> None:
        self._app, self._config, self._slots = app, config, slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            if scope["path"] in ANSWERED:
                self._slots.check(1)
            async with asyncio.timeout(self._config.body_timeout_s):
                body = await self._read(scope, receive)
            if scope["path"] in ANSWERED and isinstance(body, bytes):
                await self._slots.turn()
        except Refusal as refusal:  # a second name would make a reference cycle with this frame
            await refusal.response()(scope, receive, send)
            return
        except TimeoutError:
            body = Refusal(408, f"The body took longer than {self._config.body_timeout_s:g} s")
        if isinstance(body, Refusal):
            await body.response()(scope, receive, send)
        elif body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | Refusal | None:
        limit = self._config.max_body_bytes
        too_large = Refusal(413, f"The body has more than {limit} bytes", code="request_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:19]) > limit:
            return too_large
        body = bytearray()
        while True:
            message: MutableMapping[str, Any] = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                return too_large
            if not message.get("more_body", False):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


class Slots:
    """Places for concurrent answers in this replica, without a queue."""

    def __init__(self, room: int) -> None:
        self._room, self.taken = room, 0
        self._turn, self._waiting = asyncio.Lock(), 0

    async def turn(self) -> None:
        """Lets one waiting request pass in each round of the event loop.

        Many at once would delay refusals and health checks. A waiting request counts as one place,
        even if it asks for more: ``take`` may still refuse it.

        Raises:
            Refusal: the waiting requests will take all places (503).
        """
        self.check(1 + self._waiting)
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.sleep(0)
        finally:
            self._waiting -= 1

    def check(self, answers: int) -> None:
        """Raises a Refusal (503) if too few places are free."""
        if self.taken + answers > self._room:
            raise Refusal(503, "All places are taken; try again in a moment", code="overloaded", retry_s=1)

    @contextmanager
    def take(self, answers: int) -> Iterator[None]:
        """Holds ``answers`` places.

        Raises:
            Refusal: too few are free (503) or exist (400).
        """
        if answers > self._room:
            raise Refusal(400, f"asks for {answers} answers; at most {self._room} fit", code="too_many_answers")
        self.check(answers)
        self.taken += answers
        try:
            yield
        finally:
            self.taken -= answers
