"""What a crowd and a slow client cost the others: heads without end, and a batch of requests at once."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from spin_ray.serving import heads
from spin_ray.serving.api import make_app
from tests.support.fake_engines import FakeEngines, empty_votes
from tests.support.tiny_runs import tiny_config

CHAT = "/v1/chat/completions"
HELLO = {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(heads, "HEAD_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = make_app(FakeEngines(), tiny_config(), [], empty_votes())
        server = uvicorn.Server(uvicorn.Config(app, http=heads.LimitedHeads, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def told(port: int, *sent: bytes) -> bytes:
    """Returns all that the server says until it hangs up, after each of ``sent``."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for part in sent:
            client.sendall(part)
        answer = b""
        while piece := client.recv(2**16):
            answer += piece
        return answer


def test_a_head_that_does_not_end_is_given_up(port: int) -> None:
    """Half a head, and half of a second one behind a whole answer, of which nothing is lost. An idle browser's
    connection ends without words.
    """
    assert told(port) == b""
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (whole[:20], whole + whole[:20]):
        answer = told(port, sent)
        assert b"408 Request Timeout" in answer and b"took more than 0.3 s" in answer
        assert (b'{"status":"ok"}' in answer) == (whole in sent)


def test_a_head_without_limit_is_refused_before_it_fills_the_memory(port: int) -> None:
    endless = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * (heads.LONGEST_HEAD + 1)
    answer = told(port, endless)
    assert b"431 Request Header Fields Too Large" in answer and b"65536 bytes" in answer
    long = {"x-a": "a" * (heads.LONGEST_HEAD - 1000)}
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", headers=long).status_code == 200


def test_a_large_body_is_no_long_head_and_a_slow_answer_no_slow_one(port: int) -> None:
    """Bodies of more than a head's limit, one after another on one connection, with a pause shorter than keep-alive."""
    body = HELLO | {"messages": [{"role": "user", "content": "a" * 2 * heads.LONGEST_HEAD}]}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):
            assert client.post(CHAT, json=body).status_code == 200
            time.sleep(0.4)


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
