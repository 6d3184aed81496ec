"""Requests of careless clients: what asks for nothing is let through, and what is wrong is named in words."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from spin_ray.errors import ConfigError
from spin_ray.serving.api import make_app
from spin_ray.serving.batch import check_published
from spin_ray.serving.bodies import CompareBody
from spin_ray.serving.compare import compare
from spin_ray.serving.engines import Item
from spin_ray.serving.errors import Refusal
from spin_ray.serving.limits import access_log
from tests.support.api_server import CHAT, COMPARE, COMPLETIONS, HELLO, Server, run
from tests.support.fake_engines import FakeEngines, empty_votes
from tests.support.made_up_run import made_up_run
from tests.support.tiny_runs import tiny_config


def answer(method: str, path: str, **asked: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        app = make_app(FakeEngines(), tiny_config(), [], empty_votes())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **asked)

    return asyncio.run(asyncio.wait_for(ask(), 20))


def text_part(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "x"} | fields]}


def test_fields_that_ask_for_nothing_are_let_through_and_others_are_named() -> None:
    nothing = {"tool_choice": "none", "modalities": ["text"], "repetition_penalty": 1.0, "min_tokens": 0, "tools": []}
    assert answer("POST", CHAT, json=HELLO | nothing).status_code == 200
    nothing |= {"tool_choice": "auto", "function_call": "none", "parallel_tool_calls": True, "use_beam_search": False}
    nothing |= {"length_penalty": 1.0, "include_stop_str_in_output": False, "spaces_between_special_tokens": True}
    nothing |= {"logprobs": False, "top_logprobs": 0, "echo": False}
    assert answer("POST", CHAT, json=HELLO | nothing | {"parallel_tool_calls": False}).status_code == 200
    streamed = {"stream": True, "stream_options": {"include_obfuscation": False, "include_usage": True}}
    assert answer("POST", CHAT, json=HELLO | streamed).headers["x-accel-buffering"] == "no"
    assert answer("POST", COMPLETIONS, json={"model": "sft", "prompt": "a", "best_of": 1}).status_code == 200
    assert answer("POST", CHAT, json=HELLO | {"web_search_options": None, "logit_bias": {}}).status_code == 200
    steering = {"tool_choice": "required", "best_of": 2, "repetition_penalty": 1.1, "ignore_eos": True, "echo": True}
    steering |= {"web_search_options": {}}  # OpenAI's models search
    for field, value in steering.items():
        response = answer("POST", CHAT, json=HELLO | {field: value})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == f"{field}: is not supported here"


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        (
            CHAT,
            {"messages": [text_part(cache_control={"a": 1})]},
            "messages.0.content.0.cache_control: is not supported here",
        ),
        (CHAT, {"messages": [text_part(**{"list[a]": 1})]}, "messages.0.content.0.list[a]: is not supported here"),
        (CHAT, {"messages": [text_part(type="image_url")]}, "messages.0.content.0.type: must be 'text'"),
        (CHAT, {"stream": True, "stream_options": {"every": 1}}, "stream_options.every: is not supported here"),
        (CHAT, {"response_format": {"type": "text", "Schema-1": 1}}, "response_format.Schema-1: is not supported here"),
        (CHAT, {"body": 1}, "body: is not supported here"),
        (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt.1.0: must be at least 0"),
    ],
)
def test_a_field_is_named_as_the_client_knows_it(path: str, change: dict[str, Any], told: str) -> None:
    body = HELLO if path == CHAT else {"model": "sft"}
    error = answer("POST", path, json=body | change).json()["error"]
    assert (error["message"], error["param"]) == (told, told.partition(":")[0])


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (json.dumps(HELLO).encode(), "text/plain", "Content-Type: must be application/json, not text/plain"),
        (b"model=sft", "", "Content-Type: must be application/json, not missing"),
        (b"[" * 100_000, "application/json", "body: is not JSON that can be read"),
        (b'{"model": "\xe9"}', "application/json", "body: is not JSON that can be read"),
        (b'{"model": "\\ud800"}', "application/json", "model: is not valid Unicode (a lone surrogate)"),
        (b'{"model": "sft", "\\ud800": 1}', "application/json", "body: is not valid Unicode (a lone surrogate)"),
        (b'{"model" "sft"}', "application/json", "body: is not JSON (Expecting ':' delimiter)"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_in_words(content: bytes, kind: str, told: str) -> None:
    response = answer("POST", CHAT, content=content, headers={"Content-Type": kind} if kind else {})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(told)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HELLO),
        (COMPLETIONS, {"model": "sft", "prompt": "a"}),
        (COMPARE, {"models": ["sft", "iter-0"], "messages": HELLO["messages"]}),
    ],
)
def test_a_client_that_hangs_up_before_its_whole_answer_ends_it(
    path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        server, left = Server(max_concurrent=2), asyncio.Event()
        server.engines.gate.clear()
        sent: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if not sent:
                await left.wait()
            return sent.pop() if sent else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        before = asyncio.all_tasks()
        asked = asyncio.create_task(server.app(scope, receive, send))
        while server.engines.active < len(body.get("models", "1")):
            await asyncio.sleep(0)
        left.set()
        await asked
        assert server.engines.active == 0 and asyncio.all_tasks() == before
        server.engines.gate.set()
        assert (await server.post(CHAT, HELLO | {"n": 2})).status_code == 200

    with caplog.at_level("INFO", access_log.name):
        run(check())
    logged = [json.loads(record.getMessage()) for record in caplog.records if record.name == access_log.name]
    assert [(line["path"], line["status"]) for line in logged] == [(path, 499), (CHAT, 200)]


def test_the_rest_of_a_comparison_ends_with_the_first_refusal() -> None:
    class Engines(FakeEngines):
        async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
            if iterate == "sft":
                raise Refusal(503, "sft is down")
            async for item in super().answer(iterate, operation, fields):
                yield item

    async def check() -> None:
        engines = Engines()
        engines.gate.clear()
        body = CompareBody(models=["iter-0", "sft"], messages=HELLO["messages"])
        with pytest.raises(Refusal, match="sft is down"):
            await compare(engines, body, tiny_config())
        assert engines.asked and engines.active == 0

    run(check())


@pytest.mark.parametrize("spelling", ["iter-0", "iter_000", "0"])
def test_a_model_is_described_in_any_spelling_of_its_name(spelling: str) -> None:
    assert answer("GET", f"/v1/models/{spelling}").json()["id"] == "iter-0"


def test_a_file_is_not_compared_with_an_iterate_that_is_not_there(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run", iterations=4, done=2)
    check_published(run, ["sft", "iter-1", "latest"])
    with pytest.raises(ConfigError, match=r"has not published iter-2, all; it has sft, iter-0, iter-1, latest"):
        check_published(run, ["sft", "iter-2", "all"])


@pytest.mark.parametrize("path", [CHAT, "/v1/battles"])
def test_a_client_that_does_not_read_its_stream_is_cut_off_and_its_place_is_free(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection takes the head of the answer and no event."""
    monkeypatch.setattr("spin_ray.serving.events.LAST_EVENTS_S", 0.1)
    engines = FakeEngines()
    body = json.dumps({"messages": HELLO["messages"]} | (HELLO | {"stream": True} if path == CHAT else {})).encode()
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip

    async def main() -> None:
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return whole.pop() if whole else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        for _ in range(3):  # more than there are places
            whole[:] = [{"type": "http.request", "body": body, "more_body": False}]
            await asyncio.wait_for(app(dict(scope), receive, send), 20)

    app = make_app(engines, tiny_config(request_timeout_s=0.2, max_concurrent=2), [], empty_votes())
    asyncio.run(main())
    assert caplog.text.count("a client that does not read its stream is cut off") == 3
    assert engines.active == 0
