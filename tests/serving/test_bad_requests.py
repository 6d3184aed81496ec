"""Mistakes of clients at the real server: the right 4xx or nothing lost, and never a 500."""

import json
import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from spin_ray.serving.api import make_app
from tests.support.fake_engines import FakeEngines, empty_votes
from tests.support.served import ANSWER_S, Served
from tests.support.tiny_runs import tiny_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "sft", "messages": [{"role": "user", "content": "What is 2 + 3?"}]}


DOCUMENT = make_app(FakeEngines(), tiny_config(), [], empty_votes()).openapi()
schema = schemathesis.openapi.from_dict(DOCUMENT)


def test_the_server_has_the_document_that_the_next_test_goes_by(served: Served) -> None:
    assert httpx.get(f"{served.url}/openapi.json", timeout=30).json() == DOCUMENT


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
def test_no_request_is_a_500_and_every_answer_is_as_documented(case: schemathesis.Case, served: Served) -> None:
    case.call_and_validate(
        base_url=served.url,
        checks=[not_a_server_error, status_code_conformance, response_schema_conformance],
        timeout=ANSWER_S,
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "sft", "messages": [', 400),
        (b'{"model": "sft", "messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b"\x00\x01\x02", 400),
        (b'{"model": "sft", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (json.dumps(HELLO | {"temperature": -1}).encode(), 400),
        (json.dumps(HELLO | {"top_p": 1e300}).encode(), 400),
        (json.dumps(HELLO | {"max_tokens": 10**30}).encode(), 400),
        (json.dumps(HELLO | {"messages": "hi"}).encode(), 400),
        (json.dumps(HELLO | {"chat_template": "{{ 1 }}"}).encode(), 400),
        (json.dumps(HELLO | {"model": "gpt-4"}).encode(), 404),
        (b"[" * 100_000, 400),
    ],
)
def test_what_is_no_request_gets_the_status_that_says_so(served: Served, body: bytes, status: int) -> None:
    with served.connection() as raw:
        raw.sendall(request(body))
        assert status_of(raw.recv(4096)) == status


def test_a_body_without_end_is_refused_while_it_streams_in(served: Served) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with served.connection() as raw:
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        raw.settimeout(0.05)
        sent, told = 0, b""
        while not told and sent < 64 * 2**20:
            try:
                raw.sendall(chunk)
                sent += len(chunk)
                told = raw.recv(4096)
            except TimeoutError:
                continue
    assert status_of(told) == 413
    assert sent < 16 * 2**20


def test_a_body_that_dawdles_is_given_up(served: Served) -> None:
    with served.connection() as raw:
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert status_of(raw.recv(4096)) == 408


def test_a_client_that_reads_slowly_gets_all_of_its_answer_and_keeps_no_place(served: Served) -> None:
    """8 answers of 200 tokens, some 300 kB of events, read 8 kB at a time. All eight places are taken by it until the
    engine has done its part; then others are served, before the reader has gone on.
    """
    body = json.dumps(HELLO | {"max_tokens": 200, "stream": True, "n": 8, "seed": 1}).encode()
    with served.connection(receive_buffer=32768) as raw:
        raw.sendall(request(body))
        text = raw.recv(512)
        assert status_of(text) == 200
        deadline = time.monotonic() + 120
        while answer_status(served) != 200:
            assert time.monotonic() < deadline, "the reader kept its places"
            time.sleep(0.5)
        while b"[DONE]" not in text[-64:]:
            piece = raw.recv(8192)
            assert piece, text[-300:]
            text += piece
            time.sleep(0.02)
    ends = text.count(b'"finish_reason":"length"') + text.count(b'"finish_reason":"stop"')
    assert ends == 8, text[-2000:]


def answer_status(served: Served) -> int:
    body = json.dumps(HELLO | {"max_tokens": 1}).encode()
    with served.connection() as raw:
        raw.sendall(request(body))
        return status_of(raw.recv(4096))


def request(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])
