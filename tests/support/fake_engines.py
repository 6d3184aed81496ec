"""Engines without a model, for tests of the HTTP layer."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from typing import Any

from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.engines import CHAT, TOKENS, Item
from spin_ray.serving.names import Names

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}

SAID = "é\u2028a\u2029b\x85c"
"""A streamed piece; vLLM does not escape the ends of lines in it either."""


class FakeEngines:
    """Engines that answer with their model's name, count active answers and keep requests."""

    def __init__(self) -> None:
        self.names = Names()
        self.names.serve_now(["sft", "iter-0"], newest="iter-0")
        self.problems: dict[str, str] = {}
        self.troubles: dict[str, str] = {}
        self.down: set[str] = set()
        self.asked: list[dict[str, Any]] = []
        self.active = 0
        self.gate = asyncio.Event()
        """Answers wait here after their first piece."""
        self.gate.set()
        self.error: dict[str, Any] | None = None
        self.refuse: str | None = None

    def digest(self, iterate: str) -> str:
        return {"sft": "d0", "iter-0": "d1"}[iterate]

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        self.asked.append(fields)
        self.active += 1
        try:
            said = [message["content"] for message in fields.get("messages", ())]
            if self.error or self.refuse in said:
                yield {"error": self.error or {"message": "no", "code": 400}}
                return
            if not fields.get("stream"):
                await self.gate.wait()
                yield _whole(iterate, operation, fields)
                return
            choice = f'{{"index":0,"delta":{{"content":"{SAID}"}}}}'
            event = f'data: {{"model":"{iterate}","system_fingerprint":"fp-{iterate}","choices":[{choice}]}}\n\n'
            yield event + event  # an engine's pieces may hold several
            await self.gate.wait()
            yield "data: [DONE]\n\n"
        finally:
            self.active -= 1


def empty_votes() -> VoteStore:
    return VoteStore(f"sqlite:///{tempfile.mkdtemp()}/votes.sqlite")


def _whole(iterate: str, operation: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns an answer: each iterate's own token, twice.

    Token 7 has log p −1 under ``sft`` and −2 under ``iter-0``; token 8 the other way round.
    """
    own = {"sft": 7, "iter-0": 8}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if operation == TOKENS:
        choice |= {"message": {"content": fields["content"]}, "token_ids": [7 if fields["content"] == "sft" else 8] * 2}
    elif operation == CHAT:
        choice |= {"message": {"role": "assistant", "content": iterate}}
        choice |= {"token_ids": [own[iterate]] * 2} if fields.get("return_token_ids") else {}
    else:
        scores = [{str(token): {"logprob": -1.0 if token == own[iterate] else -2.0}} for token in fields["prompt"]]
        choice |= {"text": iterate, "prompt_logprobs": scores if "prompt_logprobs" in fields else None}
    answer = {"id": "1", "model": iterate, "system_fingerprint": f"fp-{iterate}", "choices": [choice], "usage": USAGE}
    return answer | ({"prompt_token_ids": [1, 2, 3]} if "token_ids" in choice else {})
