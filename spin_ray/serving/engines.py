"""Engines as the HTTP layer sees them."""

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
"""Operations of an engine. ``tokens``: a given answer with its token ids, as if sampled."""

Item = str | dict[str, Any]
"""Server-sent events as text, or a whole answer as an object."""

_HEAR_S = 10.0
"""Seconds after which a keeper without news answers."""


class Engines(Protocol):
    names: Names
    problems: dict[str, str]
    """Reasons why iterates do not serve, by name."""

    def digest(self, iterate: str) -> str:
        """Raises KeyError if ``iterate`` does not serve."""
        ...

    def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        """Yields the answer; the last item is an object with ``error`` if the engine refuses.

        Closing the iterator aborts the engine's work.

        Raises:
            Refusal: the engine is gone or fails.
        """
        ...


class ServeEngines:
    """Ray Serve applications of the keeper."""

    def __init__(self, keeper: Any) -> None:
        self.names = Names()
        self.problems: dict[str, str] = {}
        self._keeper = keeper
        self._engines: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}

    async def follow(self) -> None:
        """Follows the keeper's table for ever; keeps the last one while the keeper is away."""
        version = -1
        while True:
            try:
                table = await self._keeper.table.remote(version, _HEAR_S)
                if table["version"] != version:
                    self._take(table)
                    version = table["version"]
            except Exception as error:  # a restarted keeper counts versions anew
                logger.warning("the keeper does not answer: %s", error)
                version = -1
                await asyncio.sleep(1)

    def _take(self, table: dict[str, Any]) -> None:
        """Takes a table over, handles first: every name must have one."""
        apps = {engine["app"] for engine in table["engines"].values()}
        known = {app: self._handles.get(app) or serve.get_app_handle(app).options(stream=True) for app in apps}
        self._handles, self._engines = known, table["engines"]
        self.problems = table["problems"]
        self.names.serve_now(table["engines"], table["newest"])

    def digest(self, iterate: str) -> str:
        return self._engines[iterate]["digest"]

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        if iterate not in self._engines:  # gone since its name was resolved
            raise Refusal(503, f"{iterate} serves no more; ask for another model", retry_s=1)
        handle = self._handles[self._engines[iterate]["app"]]
        response = handle.answer.remote(operation, fields)
        ended = False
        try:
            async for item in response:
                yield item
            ended = True
        except RayTaskError as error:  # not about the request
            logger.exception("%s failed", iterate)
            raise Refusal(500, "the engine failed; the request may be repeated") from error
        except (RayServeException, RayError) as error:  # its replica is gone or not there yet
            raise Refusal(503, "The engine is not available; try again in a moment", retry_s=1) from error
        finally:
            if not ended:  # the client left
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
