"""Engines of Ray Serve that die, over handles that are not Ray's."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import RayActorError

from spin_ray.serving.engines import CHAT, ServeEngines, whole
from spin_ray.serving.errors import Refusal
from spin_ray.serving.poison import POISON_S, PoisonList, request_digest

DEADLY, HARMLESS = {"messages": ["deadly"]}, {"messages": ["hello"]}


class Handle:
    """A handle whose engine dies of ``DEADLY``, in words or without."""

    def __init__(self, without_words: bool) -> None:
        self.answer, self._without_words, self.asked = self, without_words, 0

    def remote(self, operation: str, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async def items() -> AsyncIterator[dict[str, Any]]:
            self.asked += 1
            if fields["messages"] != DEADLY["messages"]:
                yield {"choices": []}
            elif self._without_words:
                raise RayActorError
            else:
                yield {"error": {"code": 503, "message": "the engine ended"}}

        return items()


def engines(handle: Any) -> ServeEngines:
    made = ServeEngines(None)
    made._handles = {"app": handle}
    made._take({
        "engines": {name: {"app": "app", "digest": "d"} for name in ("sft", "iter-0")}, "newest": None, "problems": {},
        "down": [],
    })  # fmt: skip
    return made


@pytest.mark.parametrize("without_words", [False, True])
def test_a_request_that_ended_an_engine_is_refused_the_second_time_by_every_model(without_words: bool) -> None:
    async def check() -> None:
        handle = Handle(without_words)
        made = engines(handle)
        with pytest.raises(Refusal) as died:
            await whole(made, "sft", CHAT, DEADLY | {"model": "sft"})
        assert (died.value.status, died.value.code) == (503, "engine_down") and died.value.retry_s
        assert made.down == {"sft"}
        with pytest.raises(Refusal) as poisoned:
            await whole(made, "iter-0", CHAT, DEADLY | {"model": "iter-0", "stream": True})
        assert (poisoned.value.status, poisoned.value.code) == (400, "poisoned")
        with pytest.raises(Refusal) as down:  # it does not wait for the engine
            await whole(made, "sft", CHAT, HARMLESS)
        assert (down.value.status, down.value.retry_s) == (503, 5)
        assert await whole(made, "iter-0", CHAT, HARMLESS) == {"choices": []}
        assert handle.asked == 2

    asyncio.run(check())


def test_poison_is_forgotten() -> None:
    now = 0.0
    poison = PoisonList(lambda: now)
    poison.add(request_digest(CHAT, DEADLY))
    assert poison.wait_s(request_digest(CHAT, DEADLY)) == POISON_S
    assert poison.wait_s(request_digest(CHAT, HARMLESS)) == 0
    now = POISON_S
    assert poison.wait_s(request_digest(CHAT, DEADLY)) == 0
