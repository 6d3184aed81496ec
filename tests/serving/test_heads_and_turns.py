"""What a crowd and a slow client cost the others: heads without end, unread answers, a batch of requests at once."""

import asyncio
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from spin_ray.runtime import garbage
from spin_ray.serving import app, events, heads
from spin_ray.serving.api import make_app
from spin_ray.serving.engines import Item
from spin_ray.serving.limits import Slots, WholeBody, access_log
from tests.support.fake_engines import FakeEngines, empty_votes
from tests.support.tiny_runs import tiny_config

CHAT = "/v1/chat/completions"
HELLO = {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines()


@pytest.fixture
def port(engines: FakeEngines) -> Iterator[int]:
    with listening(engines) as port:
        yield port


@contextmanager
def listening(engines: FakeEngines, **serving: Any) -> Iterator[int]:
    """Starts a server and yields its port; it must stop within 20 s."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = make_app(engines, tiny_config(**serving), [], empty_votes())
        config = uvicorn.Config(
            app, http=heads.LimitedHeads, log_level="error", lifespan="off",
            timeout_keep_alive=60,  # longer than any test leaves a connection idle
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def told(port: int, *sent: bytes) -> bytes:
    """Returns all that the server says until it hangs up, after each of ``sent``."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for part in sent:
            client.sendall(part)
        answer = b""
        while piece := client.recv(2**16):
            answer += piece
        return answer


def test_a_head_that_does_not_end_is_given_up(port: int, engines: FakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a head, and half of another behind whole ones, of whose answers nothing is lost, however late they come.

    An idle browser's connection ends without words, and one that has asked before is kept.
    """
    monkeypatch.setattr(heads, "HEAD_S", 2)
    engines.gate.clear()
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    late = request(b"", json.dumps(HELLO).encode())
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client, ThreadPoolExecutor(5) as pool:
        before = address(client)
        asked = (b"", whole[:20], whole + whole[:20], late + 2 * whole + whole[:20])
        idle, *others = [pool.submit(told, port, sent) for sent in asked]
        time.sleep(3)
        engines.gate.set()
        assert address(client) == before
        assert idle.result() == b""
        for answers, other in enumerate(others):
            answer = other.result()
            assert b"408 Request Timeout" in answer and b"took more than 2 s" in answer
            assert answer.count(b"HTTP/1.1 200 OK") == (0, 1, 3)[answers]


def address(client: httpx.Client) -> tuple[str, int]:
    """Returns the client's own address at the connection by which it is answered."""
    response = client.get("/healthz")
    assert response.status_code == 200
    return response.extensions["network_stream"].get_extra_info("client_addr")


def request(headers: bytes, body: bytes) -> bytes:
    length = b"" if b"chunked" in headers else b"Content-Length: %d\r\n" % len(body)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + length + headers + b"\r\n" + body


def test_trailers_are_dropped_and_end_the_connection_past_the_limit(port: int) -> None:
    """Many small ones, and a value without end. One that fits is no header of the request."""
    body = json.dumps(HELLO).encode()
    chunked = request(b"Transfer-Encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n" % (len(body), body))
    close = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = told(port, chunked + b"X-Request-ID: trailer\r\n\r\n" + close)
    assert answer.count(b"200 OK") == 2 and b"trailer" not in answer
    for endless in (b"a: b\r\n" * 2**15, b"a: " + b"b" * 2**20):
        with suppress(ConnectionError):  # more was sent than the server has read
            assert told(port, chunked, endless) == b""


def test_an_offer_of_another_protocol_is_ignored(port: int) -> None:
    """Java's client offers HTTP/2 with its first request. The second one here follows in the same packet."""
    body = json.dumps(HELLO).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    asked = request(offer, body) * 2 + request(b"Connection: close\r\n", body)
    for parts in ((asked,), (asked[:100], asked[100:300], asked[300:])):
        answer = told(port, *parts)
        assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b'"content":"sft"') == 3


def test_a_head_without_limit_is_refused_before_it_fills_the_memory(port: int) -> None:
    endless = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * (heads.LONGEST_HEAD + 1)
    answer = told(port, endless)
    assert b"431 Request Header Fields Too Large" in answer and b"65536 bytes" in answer
    for whole in (endless + b"\r\n\r\n", b"GET /?" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        assert told(port, whole).startswith(b"HTTP/1.1 431")
    long = {"x-a": "a" * (heads.LONGEST_HEAD - 1000)}
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", headers=long).status_code == 200


def test_a_large_body_is_no_long_head(port: int) -> None:
    """Bodies of more than a head's limit, one after another on one connection."""
    body = HELLO | {"messages": [{"role": "user", "content": "a" * 2 * heads.LONGEST_HEAD}]}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):
            assert client.post(CHAT, json=body).status_code == 200


class LongAnswers(FakeEngines):
    """Engines whose answers are longer than what the system keeps for a client that does not read."""

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        piece = "a" * 2**20
        if not fields.get("stream"):
            yield {"choices": [], "text": 32 * piece}
            return
        for _ in range(32):
            yield f"data: {piece}\n\n"


def ask_and_read_nothing(port: int, body: dict[str, Any]) -> socket.socket:
    """Returns the connection once the answer has begun to arrive."""
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(request(b"", json.dumps(body).encode()))
    assert client.recv(12) == b"HTTP/1.1 200"
    return client


def test_a_client_that_reads_nothing_of_its_stream_loses_its_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server forgets the rest of the stream, and logs no success."""
    monkeypatch.setattr(events, "LAST_EVENTS_S", 0.1)
    caplog.set_level("INFO", access_log.name)
    with (
        listening(LongAnswers(), request_timeout_s=0.5) as port,
        ask_and_read_nothing(port, HELLO | {"stream": True}) as client,
    ):
        wait_for(lambda: access_log.name in {record.name for record in caplog.records})
        assert len(rest_of(client)) < 30 * 2**20
    logged = [json.loads(record.getMessage()) for record in caplog.records if record.name == access_log.name]
    assert [line["status"] for line in logged] == [504]
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_stops_although_a_client_does_not_read_its_answer(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn itself waits until all connections are closed, and those until all is read."""
    for module in (events, heads):
        monkeypatch.setattr(module, "LAST_EVENTS_S", 0.1)
    with ExitStack() as held:
        with listening(LongAnswers(), request_timeout_s=0.5) as port:
            client = held.enter_context(ask_and_read_nothing(port, HELLO | {"stream": stream}))
        assert len(rest_of(client)) < 30 * 2**20


def test_a_server_that_stops_lets_a_slow_client_read_its_answer_to_the_end() -> None:
    with ExitStack() as held:
        with listening(LongAnswers()) as port:
            client = held.enter_context(ask_and_read_nothing(port, HELLO))
            reading = held.enter_context(ThreadPoolExecutor(1)).submit(lambda: time.sleep(1) or rest_of(client))
        assert len(reading.result()) > 32 * 2**20


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rest_of(client: socket.socket) -> bytes:
    """Returns what still arrives until the server hangs up."""
    rest = bytearray()
    with suppress(ConnectionError):
        while piece := client.recv(2**20):
            rest += piece
    return bytes(rest)


def test_a_batch_of_requests_lets_a_health_check_pass() -> None:
    """Thirty requests come at once, then a check: it is answered before the second of them reaches an engine."""
    engines = FakeEngines()
    app = make_app(engines, tiny_config(max_concurrent=30), [], empty_votes())

    async def check() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = [asyncio.create_task(client.post(CHAT, json=HELLO)) for _ in range(31)]
            healthy = asyncio.create_task(client.get("/healthz"))
            assert (await healthy).status_code == 200
            handed_over = len(engines.asked)
            statuses = sorted([(await task).status_code for task in asked])
        assert handed_over <= 2 and len(engines.asked) == 30
        assert statuses == [200] * 30 + [503]

    asyncio.run(asyncio.wait_for(check(), 20))


def test_a_connection_outlives_head_requests(port: int) -> None:
    """One asks for a page, one for a route without HEAD; neither gets a body, and both go on."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        addresses = set()
        for path, status in (("/healthz", 200), (CHAT, 405), ("/v1/models", 200)):
            response = client.head(path)
            assert (response.status_code, response.content) == (status, b"")
            addresses.add(response.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(addresses) == 1


class _Scope(dict[str, Any]):
    """A dict that weak references can follow."""


def test_a_refusal_leaves_no_cycle_behind() -> None:
    """Hundreds of refusals a second would fill the collector's young objects, whose search stops every answer."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no place is free")

    async def sent(_: Any) -> None:
        pass

    async def refuse() -> weakref.ref[_Scope]:
        """Returns what dies with the frames that answered the request, unless they are in a cycle."""
        scope = _Scope(type="http", method="POST", path=CHAT, headers=[])
        await WholeBody(inner, tiny_config().serving, Slots(0))(scope, inner, sent)
        return weakref.ref(scope)

    gc.disable()
    try:
        scope = asyncio.run(refuse())
        assert scope() is None
    finally:
        gc.enable()


def test_a_server_looks_for_cycles_as_often_as_python_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``spin-ray`` sets for a run's driver would stop every answer for 0.2 s at a time."""
    as_it_was, frozen = gc.get_threshold(), gc.get_freeze_count()
    monkeypatch.setattr(app, "ServeEngines", lambda keeper, sees_all: SimpleNamespace(follow=lambda: asyncio.sleep(0)))
    monkeypatch.setattr(app, "make_app", lambda *given, **settings: FastAPI())

    async def build() -> None:
        app.endpoint(str(tmp_path), tiny_config(), None)

    try:
        garbage.collect_rarely()
        asyncio.run(build())
        assert gc.get_threshold() == garbage._AS_USUAL
    finally:
        gc.set_threshold(*as_it_was)
        if not frozen:
            gc.unfreeze()
