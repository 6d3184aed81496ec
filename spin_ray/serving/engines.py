"""Engines as the HTTP layer sees them."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.util.metrics import Counter

from spin_ray.errors import last_line, user_error_in
from spin_ray.serving.errors import Refusal, engine_failed, from_engine, no_answer
from spin_ray.serving.names import Names
from spin_ray.serving.poison import POISON_S, PoisonList, Served, request_digest

logger = logging.getLogger("ray.serve")

CHAT, COMPLETION, TOKENS = "chat", "completion", "tokens"
"""Operations of an engine. ``tokens`` returns a given answer with token ids, as if sampled."""

Item = str | dict[str, Any]
"""Server-sent events as text, or an object: a whole answer or an ``error``."""

_HEAR_S = 10.0
"""Seconds after which the keeper answers even without news."""
_SUSPECT_S = 12.0
"""Seconds for which an engine counts as down after its death was seen here. Then the keeper's table is up to date."""
_NOTE_S = 10.0
"""Fewest seconds between two failures of an iterate's answers of which the keeper is told."""
DOWN_RETRY_S = 5
RUN = "run"
"""Name of the run among the ``troubles`` of the keeper's table."""
ENDED = "its engine has ended and starts again"
ENGINE_DIED = "the engine ended while it served this request; it starts again"


class Engines(Protocol):
    names: Names
    problems: dict[str, str]
    """Reasons why iterates do not serve, by name."""
    troubles: dict[str, str]
    """``troubles`` of the keeper's table."""

    @property
    def down(self) -> set[str]:
        """Iterates whose engine has died and starts again."""
        ...

    def digest(self, iterate: str) -> str:
        """Raises KeyError if ``iterate`` does not serve."""
        ...

    def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        """Yields the answer; the last item is an object with ``error`` if the engine refuses.

        Closing the iterator aborts the engine's work.

        Raises:
            Refusal: the engine is gone, down or fails, or engines die of the same request.
        """
        ...


class ServeEngines:
    """The engines that the keeper runs as Ray Serve applications."""

    def __init__(self, keeper: Any, *, sees_all: bool) -> None:
        """Knows no engine until it follows ``keeper``; ``sees_all`` is that of ``PoisonList``."""
        self.names = Names()
        self.problems: dict[str, str] = {}
        self.troubles: dict[str, str] = {}
        self._keeper = keeper
        self._engines: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._newest: str | None = None
        self._reported: set[str] = set()
        self._suspected: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._poison = PoisonList(sees_all=sees_all)
        self._poisoned = Counter(
            "spin_ray_poisoned_requests", "Requests refused because engines die of them.", ("model",)
        )

    @property
    def down(self) -> set[str]:
        now = time.monotonic()
        suspected = {app for app, until in self._suspected.items() if until > now}
        return {name for name, engine in self._engines.items() if name in self._reported or engine["app"] in suspected}

    async def follow(self) -> None:
        """Follows the keeper's table for ever; the last table holds while the keeper is away.

        Models of that table stay known until a restarted keeper has dealt with each.
        """
        version, keeper = -1, None
        while True:
            try:
                table = await self._hear(version)
                restarted = table["keeper"] != keeper
                if restarted:
                    self._kept, keeper = self._engines, table["keeper"]
                if restarted or table["version"] != version:
                    self._take(table)
                    version = table["version"]
            except Exception as error:
                logger.warning("the keeper does not answer: %s", error)
                version, self._kept = -1, self._engines
                await asyncio.sleep(1)

    async def _hear(self, version: int) -> dict[str, Any]:
        response = self._keeper.table.remote(version, _HEAR_S)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the keeper's end would wait for the call's
            raise

    def _take(self, table: dict[str, Any]) -> None:
        """Takes over a table. Handles come first: every name must have one."""
        if table["settled"]:
            self._kept = {}
        engines = self._kept | table["engines"]
        apps = {engine["app"] for engine in engines.values()}
        known = {app: self._handles.get(app) or serve.get_app_handle(app).options(stream=True) for app in apps}
        self._handles, self._engines = known, engines
        self.problems, self.troubles = table["problems"], table["troubles"]
        self._newest = table["newest"] or (self._newest if self._kept else None)
        running = apps if table["running"] is None else table["running"]
        gone = {name for name, engine in self._kept.items() if engine["app"] not in running}
        self._reported = set(table["down"]) | gone - table["engines"].keys()
        settled = table["settled"] or bool(table["problems"])
        self.names.serve_now(engines, self._newest, table["starting"], settled=settled)

    def digest(self, iterate: str) -> str:
        return self._engines[iterate]["digest"]

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        if iterate not in self._engines:  # gone since its name was resolved
            raise Refusal(503, f"{iterate} serves no more; ask for another model", retry_s=1)
        digest = request_digest(operation, fields)
        self._check(iterate, digest)
        app = self._engines[iterate]["app"]
        with self._poison.serving(app, digest) as request:
            response = self._handles[app].answer.remote(operation, fields)
            ended = False
            try:
                async for item in response:
                    if isinstance(item, dict) and (refused := item.get("error")):
                        self._note_error(iterate, request, refused)
                    yield item
                ended = True
            except RayActorError as error:
                self._note_death(iterate, request)
                raise Refusal(503, ENGINE_DIED, code="engine_down", retry_s=DOWN_RETRY_S) from error
            except RayTaskError as error:  # not about the request
                logger.exception("%s failed", iterate)
                lasting = user_error_in(error)
                self._note_failure(iterate, str(lasting or last_line(error)))
                if lasting:
                    raise Refusal(404, f"{iterate} cannot answer: {lasting}", code="model_not_found") from error
                raise engine_failed() from error
            except (RayServeException, RayError) as error:  # its replica is gone or not there yet
                raise Refusal(503, "The engine is not available; try again in a moment", retry_s=1) from error
            finally:
                if not ended:  # the client left
                    with suppress(Exception):
                        response.cancel()

    def _check(self, iterate: str, digest: str) -> None:
        if wait_s := self._poison.wait_s(digest):
            self._poisoned.inc(1, {"model": iterate})
            raise Refusal(
                400, f"an engine ended while it served this request; it is refused for {wait_s:.0f} s", code="poisoned"
            )
        if iterate in self.down:  # its handle would let the request wait for the new engine
            raise Refusal(503, f"{iterate} is down: its engine starts again", code="engine_down", retry_s=DOWN_RETRY_S)

    def _note_error(self, iterate: str, request: Served, error: dict[str, Any]) -> None:
        status = from_engine(error).status
        if status == 503:
            self._note_death(iterate, request)
        elif status == 500:
            self._note_failure(iterate, str(error.get("message", "")))

    def _note_failure(self, iterate: str, what: str) -> None:
        """Tells the keeper, whose table says it to who runs the server."""
        if time.monotonic() - self._noted.get(iterate, -math.inf) > _NOTE_S:
            self._noted[iterate] = time.monotonic()
            self._keeper.note_failure.remote(iterate, what)

    def _note_death(self, iterate: str, request: Served) -> None:
        self._suspected[request.engine] = time.monotonic() + _SUSPECT_S
        what = f"; it is refused for {POISON_S:.0f} s" if self._poison.note_death(request) else ""
        logger.error("the engine of %s died while it served request %s%s", iterate, request.digest, what)


async def whole(engines: Engines, iterate: str, operation: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer as one object; raises Refusal if the engine refuses or fails."""
    answer: Any = engines.answer(iterate, operation, fields)
    async with aclosing(answer) as items:
        async for item in items:
            if isinstance(item, dict):
                if "error" in item:
                    raise from_engine(item["error"])
                return item
    raise no_answer()
