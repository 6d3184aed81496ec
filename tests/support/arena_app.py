"""The arena's application over engines with fixed answers, streamed word by word.

As a program, a server of its own: ``python -m tests.support.arena_app DATABASE_URL PORT``.
"""

import asyncio
import json
import re
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from spin_ray.serving.access import Key
from spin_ray.serving.api import make_app
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.engines import CHAT, Item
from spin_ray.serving.names import Names
from tests.support.tiny_runs import tiny_config

ITERATES = ("sft", "iter-0", "iter-1")
SAYS = {
    "sft": "Certainly! As a helpful assistant, I would be delighted to provide you with a comprehensive overview of my"
    " day. It began, as days so often do, with a morning.\n\nIs there anything else I can help you with?",
    "iter-0": "pretty good, thanks! a bit tired, i was up late with a book. how about you?",
    "iter-1": "not bad :) went for a run before it got hot. you?",
}
EVIL = "<img src=x onerror=\"document.title='owned'\"> & <script>alert(1)</script>"


class TalkingEngines:
    """Engines with one answer for each iterate; "evil" in the prompt gives markup, "fail" a failure in the middle.

    An answer is one token, with log p −10 under its own iterate and −30 under the others.
    """

    def __init__(self) -> None:
        self.names = Names()
        self.names.serve_now(ITERATES, newest=ITERATES[-1])
        self.problems: dict[str, str] = {}
        self.troubles: dict[str, str] = {}
        self.down: set[str] = set()
        self.gate = threading.Event()
        """Answers wait here before their last word."""
        self.gate.set()

    def digest(self, iterate: str) -> str:
        return digest(iterate)

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        if operation != CHAT:
            yield scored(iterate, **fields)
            return
        prompt = fields["messages"][-1]["content"]
        if "fail" in prompt:
            yield event({"content": "well"})
            yield {"error": {"code": 500}}
            return
        async for piece in says(EVIL if "evil" in prompt else SAYS[iterate], self.gate):
            yield piece


def digest(iterate: str) -> str:
    return f"{ITERATES.index(iterate) + 1}" * 64


def make(
    votes: VoteStore,
    *,
    keys: list[Key] | None = None,
    engines: TalkingEngines | None = None,
    **serving: Any,
) -> FastAPI:
    return make_app(engines or TalkingEngines(), tiny_config(**serving), keys or [], votes)


def scored(iterate: str, **fields: Any) -> dict[str, Any]:
    """Returns the answer as a token, or the scores of prompt and token."""
    if "prompt" in fields:
        own = fields["prompt"][-1] == ITERATES.index(iterate)
        return {
            "choices": [{"prompt_logprobs": [None, {str(fields["prompt"][-1]): {"logprob": -10.0 if own else -30.0}}]}]
        }
    token = list(SAYS.values()).index(fields["content"])
    choice = {"token_ids": [token], "message": {"content": fields["content"]}, "finish_reason": fields["finish_reason"]}
    return {"prompt_token_ids": [0], "choices": [choice], "usage": {}}


async def says(text: str, gate: threading.Event) -> AsyncIterator[str]:
    """Yields the events of a chat completion as vLLM writes them; the last word waits for ``gate``."""
    *words, last = re.findall(" ?[^ ]+", text)
    for word in words:
        yield event({"content": word})
        await asyncio.sleep(0)
    while not gate.is_set():
        await asyncio.sleep(0.01)
    yield event({"content": last})
    yield event({}, "stop")
    yield "data: [DONE]\n\n"


def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


if __name__ == "__main__":
    uvicorn.run(make(VoteStore(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
