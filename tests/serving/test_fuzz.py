"""Token-level requests at random, within and beyond every limit, at the real engines."""

import json
import random
import time
from typing import Any

import httpx
import pytest

from tests.support.served import ANSWER_S, Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FUZZ_S = 12.0
EDGES: dict[str, list[Any]] = {
    "temperature": [0, 1e-9, 1e-320, 2, 2.0001, -1, float("nan"), float("inf"), "1", None],
    "top_p": [0, 1e-9, 1, 1.0001, -1, float("nan")],
    "top_k": [-2, -1, 0, 1, 383, 384, 10**6, 2**31 - 1, 2**31, 10**30],
    "min_p": [0, 1, 1.1, -0.1, float("-inf")],
    "presence_penalty": [-2, 2, 2.1, float("nan")],
    "frequency_penalty": [-2, 2, -3],
    "seed": [-2, -1, 0, 2**63 - 1, 2**63, 10**30, 1.5],
    "stop": ["", "a", [], ["a"] * 4, ["a"] * 5, [""], "\x00", "é" * 5000, [1], "\ud800"],
    "n": [0, 1, 2, 8, 9, 16, 17, -1, 10**9],
    "max_tokens": [0, 1, 5, 200, 201, 256, -1, 10**30],
    "logprobs": [0, 1, 20, 21, -1, True, 10**9],
    "echo": [True, False, 1],
    "stream": [True, False, None, "yes"],
    "logit_bias": [None, {}, {"5": 100}, {"100000": 1}, {"-1": 1}],
    "stop_token_ids": [[1], [10**9], None],
    "prompt_logprobs": [0, 5, 10**6],
    "allowed_token_ids": [[], [384], [1]],
    "bad_words": [["a"], [""]],
    "min_tokens": [0, 5, 10**9],
    "structured_outputs": [{"regex": "(a+)+$"}],
    "prompt_embeds": ["AAAA"],
    "return_token_ids": [True],
    "kv_transfer_params": [{"a": 1}],
}
"""Values at and beyond the limits of fields that this server or vLLM has; the tiny model embeds ids 0 to 383."""


def request(dice: random.Random) -> dict[str, Any]:
    """Returns a completion's body of up to four edges and a prompt of ids."""
    ids = [dice.randrange(384) for _ in range(dice.choice([1, 2, 7, 100, 253, 254, 255, 256, 257, 2000]))]
    if dice.random() < 0.3:
        ids[dice.randrange(len(ids))] = dice.choice([384, 385, 49152, 2**31 - 1, 2**31, 2**63, 10**30, -1, -(2**31)])
    prompt = dice.choice([ids, ids, ids, [ids, [1, 2]], [], [[]], [ids, "a"], "hello", [1.5], [None]])
    fields = {name: dice.choice(EDGES[name]) for name in dice.sample(sorted(EDGES), dice.randrange(5))}
    return {"model": dice.choice(["sft", "latest"]), "prompt": prompt, "max_tokens": 3} | fields


def test_no_request_ends_an_engine_and_every_answer_is_json(served: Served) -> None:
    before = set(served.engines())
    assert len(before) == 2
    dice, statuses = random.Random(22), set()
    end = time.monotonic() + FUZZ_S
    with httpx.Client(timeout=ANSWER_S) as client:
        while time.monotonic() < end:
            body = request(dice)
            content = json.dumps(body).encode()
            response = client.post(
                f"{served.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
            )
            assert response.status_code in (200, 400, 503), (response.status_code, response.text[:300], content[:1000])
            statuses.add(response.status_code)
            if response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("data: [DONE]\n\n"), content[:1000]
            else:
                told = response.json()
                assert ("choices" in told) == (response.status_code == 200), (told, content[:1000])
        assert client.get(f"{served.url}/readyz").json().get("down") is None
    assert {200, 400} <= statuses
    assert set(served.engines()) == before, "a process is known by its number and its start"
