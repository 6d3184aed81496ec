"""Engines as the HTTP layer sees them; tests of that layer put a fake in their place."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from spin_ray.serving.errors import Refusal, from_engine
from spin_ray.serving.names import Names

logger = logging.getLogger("ray.serve")

CHAT, COMPLETION, TOKENS = "chat", "completion", "tokens"
"""Operations of an engine. ``tokens``: a given answer as if it had been sampled, i.e. with its token ids."""

Item = str | dict[str, Any]
"""A piece of an answer: server-sent events as text, or a whole answer as an object."""

_HEAR_S = 10.0
"""Seconds after which a keeper that has nothing new says so."""


class Engines(Protocol):
    """The engines that serve, one for each iterate."""

    names: Names
    problems: dict[str, str]
    """Reasons of iterates that should serve and do not, by name."""

    def digest(self, iterate: str) -> str:
        """Returns the digest of the checkpoint that answers for ``iterate``.

        Raises:
            KeyError: ``iterate`` does not serve.
        """
        ...

    def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        """Yields the engine's answer; the last item is an object with ``error`` if the engine refuses.

        Closing the iterator aborts the engine's work.

        Raises:
            Refusal: the engine has gone or fails.
        """
        ...


class ServeEngines:
    """Engines that are Ray Serve applications, as the keeper lists them."""

    def __init__(self, keeper: Any) -> None:
        self.names = Names()
        self.problems: dict[str, str] = {}
        self._keeper = keeper
        self._engines: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}

    async def follow(self) -> None:
        """Follows the keeper's table for ever; the last one stays while the keeper is away."""
        version = -1
        while True:
            try:
                table = await self._keeper.table.remote(version, _HEAR_S)
                if table["version"] != version:
                    self._take(table)
                    version = table["version"]
            except Exception as error:  # Ray Serve starts the keeper again, with versions of its own
                logger.warning("the keeper does not answer: %s", error)
                version = -1
                await asyncio.sleep(1)

    def _take(self, table: dict[str, Any]) -> None:
        """Takes a table over, handles first: a name must never resolve to an engine that cannot be called."""
        apps = {engine["app"] for engine in table["engines"].values()}
        known = {app: self._handles.get(app) or serve.get_app_handle(app).options(stream=True) for app in apps}
        self._handles, self._engines = known, table["engines"]
        self.problems = table["problems"]
        self.names.serve_now(table["engines"], table["newest"])

    def digest(self, iterate: str) -> str:
        return self._engines[iterate]["digest"]

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        if iterate not in self._engines:  # it has gone since its name was looked up
            raise Refusal(503, f"{iterate} serves no more; ask for another model", retry_s=1)
        handle = self._handles[self._engines[iterate]["app"]]
        response = handle.answer.remote(operation, fields)
        ended = False
        try:
            async for item in response:
                yield item
            ended = True
        except RayTaskError as error:  # vLLM raised something that is not about the request
            logger.exception("%s failed", iterate)
            raise Refusal(500, "the engine failed; the request may be repeated") from error
        except (RayServeException, RayError) as error:  # its replica is gone, or not there yet
            raise Refusal(503, "The engine is not available; try again in a moment", retry_s=1) from error
        finally:
            if not ended:  # the client left: so does the engine's work for it
                with suppress(Exception):
                    response.cancel()


async def whole(engines: Engines, iterate: str, operation: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer as one object.

    Raises:
        Refusal: the engine refuses or fails.
    """
    answer: Any = engines.answer(iterate, operation, fields)
    async with aclosing(answer) as items:
        async for item in items:
            if isinstance(item, dict):
                if "error" in item:
                    raise from_engine(item["error"])
                return item
    raise Refusal(500, "the engine ended without an answer")
