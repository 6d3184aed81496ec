"""The HTTP layer over engines without a model: OpenAI's form, what is refused and told, and comparisons."""

import json
from typing import Any

import httpx
import pytest

from spin_ray.config.load import override
from spin_ray.serving.api import DIGEST_HEADER, make_app
from spin_ray.serving.compare import margins
from spin_ray.serving.limits import access_log
from tests.support.api_server import CHAT, COMPARE, COMPLETIONS, HELLO, JSON, Server, refused, run
from tests.support.fake_engines import SAID, FakeEngines, empty_votes
from tests.support.tiny_runs import tiny_config


def test_an_answer_says_which_checkpoint_gave_it_and_latest_which_iterate() -> None:
    async def check() -> None:
        server = Server()
        response = await server.post(CHAT, HELLO | {"model": "latest"})
        assert response.json()["model"] == "iter-0"
        assert response.headers[DIGEST_HEADER] == "d1"

    run(check())


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("job-7:a@b", True), ('a"}{"status": 200', False), ("é", False), ("a" * 129, False), ("", False)],
)
def test_a_harmless_request_id_comes_back_and_stands_in_the_log(
    given: str, is_kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        with caplog.at_level("INFO", access_log.name):
            response = await Server().client.get("/v1/models", headers={"X-Request-ID": given.encode()})  # type: ignore[dict-item]
        (logged,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == access_log.name]
        (told,) = response.headers.get_list("x-request-id")
        assert logged["request_id"] == told and (told == given) == is_kept and told

    run(check())


def test_ray_serves_proxies_return_the_request_id_themselves() -> None:
    async def check() -> None:
        app = make_app(FakeEngines(), tiny_config(), [], empty_votes(), proxied=True)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            assert "x-request-id" not in (await client.get("/v1/models")).headers

    run(check())


def test_streams_pass_as_server_sent_events_and_free_their_place() -> None:
    async def check() -> None:
        server = Server(max_concurrent=1)
        for _ in range(3):
            response = await server.post(CHAT, HELLO | {"stream": True})
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.text.endswith("data: [DONE]\n\n")

    run(check())


def test_no_client_takes_a_text_for_the_end_of_an_event() -> None:
    """httpx, like ``str.splitlines``, also ends lines at U+0085, U+2028 and U+2029."""

    async def check() -> None:
        async with Server().client.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
            lines = [line async for line in response.aiter_lines() if line]
        *told, end = [line.removeprefix("data: ") for line in lines]
        assert [json.loads(each)["choices"][0]["delta"]["content"] for each in told] == [SAID] * 2 and end == "[DONE]"

    run(check())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"), ({"n": 17}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"seed": 2**64}, "seed"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"), ({"stop": list("abcde")}, "stop"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"), ({"tools": [{}]}, "tools"), ({"priority": 1}, "priority"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"), ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_offered_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    async def check() -> None:
        server = Server()
        response = await server.client.post(CHAT, content=json.dumps(HELLO | change), headers=JSON)
        assert refused(response, 400)["param"] == param
        assert not server.engines.asked

    run(check())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"seed": 1' + b"0" * 5000 + b"}",
        b'{"\\ud800": 1}',
    ],
    ids=["empty", "cut", "list", "null", "no UTF-8", "NaN", "deep", "huge number", "lone surrogate"],
)
def test_bytes_that_are_no_request_are_a_400(body: bytes) -> None:
    async def check() -> None:
        for path in (CHAT, COMPLETIONS, COMPARE):
            refused(await Server().client.post(path, content=body, headers=JSON), 400)

    run(check())


def test_labels_that_clients_send_are_dropped() -> None:
    async def check() -> None:
        server = Server()
        response = await server.post(CHAT, HELLO | {"user": "u", "metadata": {"a": "b"}, "store": False})
        assert response.status_code == 200
        assert set(server.engines.asked[0]) == {"model", "messages", "max_tokens"}

    run(check())


def test_the_answer_is_limited_also_when_the_client_sets_no_limit() -> None:
    async def check() -> None:
        server = Server(max_tokens=7)
        await server.post(CHAT, HELLO)
        await server.post(CHAT, HELLO | {"max_completion_tokens": 5})
        assert [asked.get("max_tokens") for asked in server.engines.asked] == [7, None]
        for field in ("max_tokens", "max_completion_tokens"):
            error = refused(await server.post(CHAT, HELLO | {field: 8}), 400)
            assert error["param"] == field and error["message"].startswith(f"{field}: 8 is more than the 7")

    run(check())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tools": [], "logit_bias": None, "response_format": None}, {}), ({"top_k": -1}, {"top_k": -1}),
        ({"seed": -1, "stop": []}, {}),
        ({"messages": [{"role": "developer", "content": "x"}]}, {"messages": [{"role": "system", "content": "x"}]}),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}], "refusal": None}]},
            {"messages": [{"role": "assistant", "content": "x"}]},
        ),
    ],
)  # fmt: skip
def test_what_clients_of_openai_and_vllm_send_is_understood(change: dict[str, Any], expected: dict[str, Any]) -> None:
    async def check() -> None:
        server = Server()
        assert (await server.post(CHAT, HELLO | change)).status_code == 200
        (asked,) = server.engines.asked
        assert asked == {"model": "sft", "messages": HELLO["messages"], "max_tokens": 1024} | expected

    run(check())


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        (CHAT, {"stop": list("abcde")}, "stop: has 5 texts; at most 4 are allowed"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs: needs logprobs to be true"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options: is for streams only"),
        (COMPLETIONS, {"prompt": [1, -5]}, "prompt.1: must be at least 0"),
        (COMPLETIONS, {"prompt": ""}, "prompt: must not be empty"),
        (CHAT, {"model": ""}, "model: must not be empty"),
        (CHAT, {"messages": []}, "messages: must not be empty"),
        (CHAT, {"messages": HELLO["messages"] * 257}, "messages: has 257; at most 256 are allowed"),
        (CHAT, {"temperature": "1"}, "temperature: must be a number"),
        (CHAT, {"n": 17}, "n: must be at most 16"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: must be 'system', 'developer'"),
        (CHAT, {"stop": 5}, "stop: must be a text or a list"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt: must be a text or a list whose items are alike"),
        (COMPARE, {"models": ["sft"]}, "models: has 1; at least 2 must be given"),
        (CHAT, {"messages": "hello"}, "messages: must be a list"),
        (CHAT, {"messages": ["hello"]}, "messages.0: must be an object"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens: 0 is allowed only with echo"),
    ],
)
def test_a_mistake_is_told_in_words_without_pythons_own(path: str, change: dict[str, Any], words: str) -> None:
    async def check() -> None:
        body = (HELLO if path == CHAT else {"model": "sft"}) | change
        message = refused(await Server().post(path, body), 400)["message"]
        assert words in message and "function" not in message and "0x" not in message

    run(check())


def test_a_completion_without_a_length_gets_the_servers_and_none_is_allowed_with_echo() -> None:
    async def check() -> None:
        server = Server()
        for change in ({}, {"echo": True, "max_tokens": 0}):
            assert (await server.post(COMPLETIONS, {"model": "sft", "prompt": [1]} | change)).status_code == 200
        assert [asked.get("max_tokens") for asked in server.engines.asked] == [1024, 0]

    run(check())


@pytest.mark.parametrize(("code", "status"), [(400, 400), (500, 500), (None, 500)])
def test_what_the_engine_refuses_keeps_its_status(code: int | None, status: int) -> None:
    async def check() -> None:
        server = Server()
        server.engines.error = {"message": "no", "code": code}
        refused(await server.post(CHAT, HELLO), status)
        refused(await server.post(CHAT, HELLO | {"stream": True}), status)

    run(check())


def test_unknown_paths_and_methods_are_errors_in_the_same_form() -> None:
    async def check() -> None:
        server = Server()
        for path in ("/nope", "/v1/nope", "/reset_prefix_cache", "/collective_rpc", "/metrics", "/docs", "/tokenize"):
            refused(await server.client.get(path), 404)
        assert refused(await server.client.get(CHAT), 405)["message"] == f"GET {CHAT}: use POST"

    run(check())


def test_a_missing_route_is_named_with_those_that_are_there() -> None:
    async def check() -> None:
        server = Server()
        for path in ("/v1/embeddings", "/v1/responses", "/chat/completions"):
            error = refused(await server.post(path, HELLO), 404)
            assert error["message"].startswith(f"POST {path}: is no route here") and error["code"] == "unknown_url"
            assert f"{CHAT}, {COMPLETIONS}, {COMPARE}, /v1/models" in error["message"]
            assert "arena.js" not in error["message"]
            assert ("should end in /v1" in error["message"]) == (path == "/chat/completions")
        assert len((await server.client.get("/" + "a" * 5000)).content) < 1000

    run(check())


def test_browsers_are_told_to_be_careful_and_other_sites_get_nothing() -> None:
    async def check() -> None:
        response = await Server().client.get("/v1/models", headers={"Origin": "https://elsewhere.example"})
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert not [name for name in response.headers if name.startswith("access-control-")]

    run(check())


def test_models_are_listed_with_their_digests() -> None:
    async def check() -> None:
        server = Server()
        listed = (await server.client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["digest"]) for card in listed] == [("sft", "d0"), ("iter-0", "d1"), ("latest", "d1")]
        assert (await server.client.get("/v1/models/latest")).json() == listed[2]
        refused(await server.client.get("/v1/models/iter-3"), 404)

    run(check())


def test_not_ready_before_a_model_serves() -> None:
    async def check() -> None:
        server = Server()
        assert (await server.client.get("/readyz")).status_code == 200
        server.engines.names.serve_now([], None, settled=False)
        assert (await server.client.get("/readyz")).status_code == 503
        early = await server.post(CHAT, HELLO | {"model": "latest"})
        assert early.status_code == 503 and early.headers["retry-after"] in ("5", "6", "7")
        assert early.json()["error"]["code"] == "model_starts"
        refused(await server.post(CHAT, HELLO | {"model": "gpt-4"}), 404)
        assert (await server.client.get("/healthz")).status_code == 200

    run(check())


def test_comparison_pairs_seeds_scores_answers_and_takes_the_margin() -> None:
    """Answers [8, 8] of iter-0 and [7, 7] of sft. log p: own −2, other's −4; margin 0.5 · ((−2 + 4) − (−4 + 2)) = 2."""

    async def check() -> None:
        server = Server()
        body = {"models": ["sft", "latest"], "messages": HELLO["messages"], "logprobs": True, "temperature": 0.5}
        result = (await server.post(COMPARE, body)).json()
        first, second = server.engines.asked[:2]
        assert first["seed"] == second["seed"] == result["seed"] and first["temperature"] == 0.5
        assert result["seed"] < 2**53, "JavaScript would round it, and a client could not send it back"
        assert [answer["logps"] for answer in result["answers"]] == [
            {"sft": -2.0, "iter-0": -4.0}, {"sft": -4.0, "iter-0": -2.0},
        ]  # fmt: skip
        margin = {"policy": "iter-0", "opponent": "sft", "beta": 0.5, "length_normalised": False, "value": 2.0}
        assert result["engine_margins"] == [margin]

    run(check())


def test_a_margin_is_per_token_where_the_objective_is() -> None:
    """Ratios of 3 nats over 3 tokens and of −2 over 1 token: 10 · (3 / 3 + 2 / 1), as in training."""
    answers = [
        {"logps": {"sft": -4.0, "iter-0": -6.0}, "choices": [{"token_ids": [7]}]},
        {"logps": {"sft": -9.0, "iter-0": -6.0}, "choices": [{"token_ids": [8, 8, 9]}]},
    ]
    for length_normalised, value in ((True, 30.0), (False, 50.0)):
        config = override(tiny_config(), {"objective.beta": 10.0, "objective.length_normalised": length_normalised})
        [margin] = margins(["sft", "iter-0"], answers, config)
        assert (margin["value"], margin["length_normalised"]) == (value, length_normalised)


def test_given_answers_are_scored_and_not_sampled_again() -> None:
    """The same texts that the engines would say, so the same margin of 2; the headers tell every checkpoint."""

    async def check() -> None:
        server = Server()
        body = {"models": ["sft", "latest"], "messages": HELLO["messages"], "logprobs": True}
        given = [{"content": "sft"}, {"content": "iter-0", "finish_reason": "length"}]
        response = await server.post(COMPARE, body | {"answers": given})
        assert response.json()["engine_margins"][0]["value"] == 2.0
        assert response.headers[DIGEST_HEADER] == "d0, d1"
        assert [fields["content"] for fields in server.engines.asked[:2]] == ["sft", "iter-0"]
        assert not [fields for fields in server.engines.asked if "temperature" in fields or "seed" in fields]
        refused(await server.post(COMPARE, body | {"answers": given[:1]}), 400)

    run(check())


def test_the_list_of_models_says_why_one_does_not_serve() -> None:
    async def check() -> None:
        server = Server()
        assert "problems" not in (await server.client.get("/v1/models")).json()
        server.engines.problems = {"iter-1": "model.safetensors: differs from its digest"}
        assert (await server.client.get("/v1/models")).json()["problems"] == server.engines.problems

    run(check())


def test_the_list_of_models_says_what_ails_the_run_and_ended_engines() -> None:
    """Of an engine whose death only the ingress has seen, nothing more is known."""

    async def check() -> None:
        server = Server()
        server.engines.down = {"sft", "iter-0"}
        told = {"sft": "its engine has ended (out of memory) and starts again", "run": "cannot be followed"}
        server.engines.troubles = told
        problems = (await server.client.get("/v1/models")).json()["problems"]
        assert problems == told | {"iter-0": "its engine has ended and starts again"}

    run(check())


def test_head_is_get_without_a_body() -> None:
    async def check() -> None:
        server = Server()
        for path in ("/healthz", "/readyz", "/v1/models"):
            head, get = await server.client.head(path), await server.client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == get.headers["content-length"]
        assert (await server.client.head(CHAT)).status_code == 405

    run(check())
