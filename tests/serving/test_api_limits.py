"""The limits of the HTTP layer: keys and names, bodies, places, rates and time."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from spin_ray.serving.access import Key, new_key
from spin_ray.serving.arena.routes import FILES
from tests.support.api_server import CHAT, COMPARE, COMPLETIONS, HELLO, Server, refused, run

OPEN = {"/", "/healthz", "/-/healthz", "/readyz", "/openapi.json", *(f"/{file}" for file in FILES)}
"""Routes that need no key: the page, health, the document of the API."""


def test_without_keys_only_this_machines_own_names_are_answered() -> None:
    """A page of another site cannot reach this server by a name that it points at 127.0.0.1."""
    key, line = new_key("alice")

    async def check() -> None:
        server, keyed = Server(), Server([Key(*line.split(), per_minute=None)])
        for path in ("/", "/v1/models", "/v1/votes/export"):
            for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
                refused(await server.client.get(path, headers={"Host": host}), 403)
            for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
                assert (await server.client.get(path, headers={"Host": host})).status_code == 200
        headers = {"Host": "spin.example", "Authorization": f"Bearer {key}"}
        assert (await keyed.client.get("/v1/models", headers=headers)).status_code == 200

    run(check())


def test_an_engine_that_is_down_is_named_and_the_others_serve() -> None:
    async def check() -> None:
        server = Server()
        server.engines.down = {"iter-0"}
        ready = await server.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "models": ["sft"], "down": ["iter-0"]})
        assert "iter-0" in (await server.client.get("/v1/models")).json()["problems"]
        server.engines.down = {"sft", "iter-0"}
        ready = await server.client.get("/readyz")
        assert (ready.status_code, ready.json()["status"], ready.headers["retry-after"]) == (503, "down", "5")

    run(check())


def test_an_unknown_model_is_a_404_that_names_the_known() -> None:
    async def check() -> None:
        for name in ("gpt-4", "iter-9", "battle-1-a"):
            error = refused(await Server().post(CHAT, HELLO | {"model": name}), 404)
            assert error["code"] == "model_not_found" and "sft, iter-0, latest" in error["message"]

    run(check())


def test_a_body_above_the_limit_is_refused_before_it_has_arrived() -> None:
    async def check() -> None:
        server = Server(max_body_bytes=1000)
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 100
                yield b" " * 100

        messages: list[Any] = []
        source = endless()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await anext(source), "more_body": True}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
        await server.app(scope, receive, send)
        assert messages[0]["status"] == 413 and sent <= 1100
        refused(await server.client.post(CHAT, content=b" " * 1001), 413)

    run(check())


def test_a_body_that_dawdles_is_a_408() -> None:
    async def check() -> None:
        async def dawdling() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(5)
            yield b"}"

        refused(await Server(body_timeout_s=0.05).client.post(CHAT, content=dawdling()), 408)

    run(check())


def test_without_a_known_key_everything_under_v1_is_a_401() -> None:
    key, line = new_key("alice")
    keys = [Key(*line.split(), per_minute=None)]

    async def check() -> None:
        server = Server(keys)
        for header in ({}, {"Authorization": "Bearer sr-wrong"}, {"Authorization": key}, {"Authorization": "Bearer "}):
            assert refused(await server.post(CHAT, HELLO, **header), 401)["code"] == "invalid_api_key"
            refused(await server.client.get("/v1/models", headers=header), 401)
        assert (await server.post(CHAT, HELLO, Authorization=f"Bearer {key}")).status_code == 200
        assert (await server.client.get("/healthz")).status_code == 200

    run(check())


def test_each_key_has_a_rate_of_its_own() -> None:
    (alice, hers), (bob, his) = new_key("alice"), new_key("bob")
    keys = [Key(*hers.split(), per_minute=2), Key(*his.split(), per_minute=None)]

    async def check() -> None:
        server = Server(keys, requests_per_minute=1)
        statuses = {
            name: [(await server.post(CHAT, HELLO, Authorization=f"Bearer {key}")).status_code for _ in range(3)]
            for name, key in (("alice", alice), ("bob", bob))
        }
        assert statuses == {"alice": [200, 200, 429], "bob": [200, 429, 429]}
        response = await server.post(CHAT, HELLO, Authorization=f"Bearer {bob}")
        refused(response, 429)
        assert 0 < int(response.headers["retry-after"]) <= 60

    run(check())


def test_above_the_concurrency_limit_requests_are_refused_at_once_and_places_come_back() -> None:
    async def check() -> None:
        server = Server(max_concurrent=2)
        server.engines.gate.clear()
        held = [asyncio.create_task(server.post(CHAT, HELLO | {"stream": stream})) for stream in (False, True)]
        while server.engines.active < 2:
            await asyncio.sleep(0)
        response = await server.post(CHAT, HELLO)
        refused(response, 503)
        waits = {(await server.post(CHAT, HELLO)).headers["retry-after"] for _ in range(50)}
        assert waits == {"1", "2", "3"}, "the refused would all come back together"
        refused(await server.post(CHAT, HELLO | {"n": 3}), 503)
        server.engines.gate.set()
        assert [(await task).status_code for task in held] == [200, 200]
        refused(await server.post(CHAT, HELLO | {"n": 3}), 400)
        assert (await server.post(CHAT, HELLO | {"n": 2})).status_code == 200

    run(check())


def test_a_body_is_not_waited_for_while_all_places_are_taken() -> None:
    async def check() -> None:
        server = Server(max_concurrent=1)
        server.engines.gate.clear()
        held = asyncio.create_task(server.post(CHAT, HELLO))
        while server.engines.active < 1:
            await asyncio.sleep(0)

        async def endless() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        for path in (CHAT, COMPLETIONS, COMPARE):
            refused(await server.client.post(path, content=endless()), 503)
        server.engines.gate.set()
        assert (await held).status_code == 200

    run(check())


def test_a_client_that_hangs_up_frees_its_place_and_ends_its_engine_request() -> None:
    async def check() -> None:
        server = Server(max_concurrent=1)
        server.engines.gate.clear()
        task = asyncio.create_task(server.post(CHAT, HELLO | {"stream": True}))
        while not server.engines.active:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert server.engines.active == 0
        server.engines.gate.set()
        assert (await server.post(CHAT, HELLO)).status_code == 200

    run(check())


def test_an_answer_that_takes_too_long_ends_with_an_error() -> None:
    async def check() -> None:
        server = Server(request_timeout_s=0.1)
        server.engines.gate.clear()
        refused(await server.post(CHAT, HELLO), 504)
        stream = await server.post(CHAT, HELLO | {"stream": True})
        last = json.loads(stream.text.split("data: ")[-2])
        assert last["error"]["type"] == "timeout_error" and stream.text.endswith("data: [DONE]\n\n")
        assert server.engines.active == 0

    run(check())


def test_without_a_key_nothing_but_the_page_and_health_is_told() -> None:
    """The page's files, the two checks of health, and the document of the API."""

    async def check() -> None:
        _, line = new_key("alice")
        server = Server([Key("alice", line.split()[1], None)])
        paths = sorted({getattr(route, "path", "") for route in server.app.routes})
        answers = {path: (await server.client.get(path)).status_code for path in paths if not path.startswith("/v1")}
        assert set(answers) >= {"/healthz", "/readyz", "/openapi.json"}
        assert set(answers) == OPEN
        for path in (it for it in paths if it.startswith("/v1")):
            assert (await server.client.get(path)).status_code == 401, path

    run(check())
