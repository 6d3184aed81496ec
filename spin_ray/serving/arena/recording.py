"""Recording of a comparison's answers while they are streamed."""

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool

from spin_ray.serving.arena.battles import Answer
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.bodies import ChatBody, Sampling, plain
from spin_ray.serving.errors import Refusal

logger = logging.getLogger(__name__)

_SAMPLING = {*Sampling.model_fields, "max_completion_tokens"}


async def recorded(
    stream: AsyncIterator[str], votes: VoteStore, alias: str, body: ChatBody, digest: str
) -> AsyncIterator[str]:
    """Passes server-sent events on; keeps a whole answer *before* its last event, so that its reader can vote."""
    answer = _StreamedText()
    async for chunk in stream:
        if answer.read(chunk) and answer.finish_reason is not None:
            kept = Answer(
                messages=plain(body.messages),
                sampling=body.model_dump(include=_SAMPLING, exclude_none=True),
                text="".join(answer.text),
                finish_reason=answer.finish_reason,
                digest=digest,
            )
            try:
                await run_in_threadpool(votes.record, alias, kept)
            except Refusal as error:
                logger.warning("%s: answer not kept: %s", alias, error)
        yield chunk


@dataclass(slots=True)
class _StreamedText:
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    _rest: str = ""

    def read(self, chunk: str) -> bool:
        """Reads ``chunk``; tells whether the stream ends in it."""
        *lines, self._rest = (self._rest + chunk).split("\n")
        return any([self._line(line.strip()) for line in lines])

    def _line(self, line: str) -> bool:
        if not line.startswith("data:"):
            return False
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return True
        for choice in json.loads(data).get("choices", [])[:1]:
            self.text.append(choice["delta"].get("content") or "")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return False
