"""Both answers of a comparison, as server-sent events.

The first event is the comparison, the last ``[DONE]``. Every other event has ``side`` and ``text``, or at
the side's end ``finish_reason`` or ``error``.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, get_args

from spin_ray.serving import events
from spin_ray.serving.arena.battles import BATTLE_TTL_S, Answer, Battle, Side
from spin_ray.serving.engines import CHAT, Engines
from spin_ray.serving.errors import Refusal, from_engine, no_answer, own_error, too_slow
from spin_ray.serving.metrics import Metrics

logger = logging.getLogger("ray.serve")

Tell = Callable[[dict[str, Any] | None], None]
Record = Callable[[str, Side, Answer], Awaitable[None]]
"""``VoteStore.record`` for the event loop."""


async def both_sides(
    engines: Engines, record: Record, metrics: Metrics, battle: Battle, limit_s: float
) -> AsyncGenerator[str]:
    """Yields the events of both answers as they come; closing the iterator aborts both."""
    told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    sides = [
        asyncio.create_task(_Side(engines, record, metrics, battle, side, told.put_nowait).answer(limit_s))
        for side in get_args(Side)
    ]
    try:
        seed = battle.question.sampling["seed"]
        yield events.event({"battle": battle.id, "seed": seed, "expires_in_s": BATTLE_TTL_S})
        ended = 0
        while ended < len(sides):
            news = await told.get()
            ended += news is None
            if news is not None:
                yield events.event(news)
        yield events.END
    finally:
        for task in sides:
            task.cancel()
        await asyncio.gather(*sides, return_exceptions=True)


class _Side:
    def __init__(
        self, engines: Engines, record: Record, metrics: Metrics, battle: Battle, side: Side, tell: Tell
    ) -> None:
        self._engines, self._record, self._metrics, self._battle = engines, record, metrics, battle
        self._side: Side = side
        self._model = battle.model_a if side == "a" else battle.model_b
        self._tell = tell

    async def answer(self, limit_s: float) -> None:
        """Streams the answer; stores it *before* announcing its end, so that the reader can vote."""
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._streamed()
            await self._record(self._battle.id, self._side, answer)
            self._tell({"side": self._side, "finish_reason": answer.finish_reason})
        except TimeoutError:
            self._fail(too_slow(limit_s))
        except Refusal as refusal:
            self._fail(_gone() if refusal.code == "model_not_found" else refusal)  # whose text names the iterate
        except Exception:
            logger.exception("%s failed in a comparison", self._model)
            self._fail(own_error())
        finally:
            self._tell(None)

    async def _streamed(self) -> Answer:
        if self._model not in self._engines.names.iterates:  # gone since the draw
            raise _gone()
        digest, started = self._engines.digest(self._model), time.monotonic()
        said, finish_reason = "", None
        stream: Any = self._engines.answer(self._model, CHAT, self._battle.question.for_engine(self._model))
        async with aclosing(stream) as items:
            first = True
            async for item in items:
                if first:
                    self._metrics.first_output(self._model, time.monotonic() - started)
                    first = False
                if isinstance(item, dict):
                    raise from_engine(item.get("error", {}))
                for choice in _choices(item):
                    if text := choice["delta"].get("content"):
                        said += text
                        self._tell({"side": self._side, "text": text})
                    finish_reason = choice.get("finish_reason") or finish_reason
        if finish_reason is None:
            raise no_answer()
        return Answer(said, finish_reason, digest)

    def _fail(self, refusal: Refusal) -> None:
        refusal.message = refusal.message.replace(self._model, "this side's iterate")
        self._tell({"side": self._side, **refusal.content()})


def _gone() -> Refusal:
    return Refusal(503, "This iterate serves no more; start a new comparison")


def _choices(streamed: str) -> list[dict[str, Any]]:
    return [choice for told in events.objects(streamed) if told is not None for choice in told.get("choices", [])]
