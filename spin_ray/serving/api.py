"""The HTTP interface: OpenAI's routes, comparison, health."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Lifespan

from spin_ray.config.recipe import SpinConfig
from spin_ray.run_dir.names import LATEST, api_spelling
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.access import Key
from spin_ray.serving.arena.routes import arena_router
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.bodies import ChatBody, CompareBody, CompletionBody, Sampling, plain
from spin_ray.serving.compare import compare
from spin_ray.serving.engines import CHAT, COMPLETION, ENDED, Engines, Item
from spin_ray.serving.errors import Refusal, from_engine, from_validation, no_answer, too_slow
from spin_ray.serving.events import END, HeldStream, event
from spin_ray.serving.leaving import while_listened_to
from spin_ray.serving.limits import Access, Observe, Slots, WholeBody
from spin_ray.serving.metrics import Metrics
from spin_ray.serving.names import ModelStarts, UnknownModel

DIGEST_HEADER, ITERATE_HEADER = "x-spin-ray-digest", "x-spin-ray-iterate"

_ERROR = {
    "description": "An error in OpenAI's form",
    "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
}
_UNREADABLE = "body: is not JSON that can be read: is it UTF-8, not compressed, and not nested thousands deep?"
"""Message for the 400 that FastAPI itself raises."""
_START_RETRY_S = 5
_LONGEST_PATH = 200
"""Most characters of an unknown path that an error repeats."""
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: _ERROR for status in (400, 401, 403, 404, 408, 413, 429, 503, 504)
}


def make_app(
    engines: Engines,
    config: SpinConfig,
    keys: list[Key],
    votes: VoteStore,
    *,
    proxied: bool = False,
    run: RunDir | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    app = FastAPI(
        title="spin_ray", version="1", docs_url=None, redoc_url=None, responses={422: _ERROR}, lifespan=lifespan
    )
    metrics = Metrics()
    desk = _Desk(engines, config, metrics)
    app.include_router(_routes(engines, config, desk, run))
    app.include_router(arena_router(votes, engines, desk), responses=_REFUSALS)
    _answer_errors(app)
    app.add_middleware(WholeBody, config=config.serving, slots=desk.slots)
    app.add_middleware(Access, config=config.serving, keys=keys)
    app.add_middleware(Observe, metrics=metrics, proxied=proxied)
    return app


def _routes(engines: Engines, config: SpinConfig, desk: "_Desk", run: RunDir | None) -> APIRouter:
    router = APIRouter(responses=_REFUSALS)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: HttpRequest) -> Response:
        """Answers a conversation, in OpenAI's form."""
        return await desk.answer(CHAT, body, request)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: HttpRequest) -> Response:
        """Continues a prompt as it is, in OpenAI's form."""
        return await desk.answer(COMPLETION, body, request)

    @router.post("/v1/compare")
    async def compare_models(body: CompareBody, request: HttpRequest) -> Response:
        """Asks several models the same, with the same sampling and seed."""
        desk.check_length(body)
        request.state.log["model"] = ",".join(engines.names.resolve(model) for model in body.models)
        desk.log_text(request, plain(body.messages))
        with desk.slots.take(len(body.models)):
            async with while_listened_to(request):
                compared = await compare(engines, body, config, run)
        digests, iterates = ([answer[name] for answer in compared["answers"]] for name in ("digest", "iterate"))
        return JSONResponse(compared, headers={DIGEST_HEADER: ", ".join(digests), ITERATE_HEADER: ", ".join(iterates)})

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Lists the models that serve, and why others do not."""
        listed = {"object": "list", "data": [_card(engines, name) for name in _served(engines)]}
        problems = engines.problems | dict.fromkeys(engines.down, ENDED) | engines.troubles
        return listed | ({"problems": problems} if problems else {})

    @router.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """Describes one model: its iterate now, and the digest of its checkpoint."""
        return _card(engines, api_spelling(name))

    @router.get("/-/healthz", include_in_schema=False)  # the path that Ray Serve's proxies answer themselves
    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Says that this replica runs."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> Response:
        """Says that some model serves, and which are down; 503 while none serves."""
        known, down = _served(engines), sorted(engines.down)
        served = [name for name in known if engines.names.resolve(name) not in engines.down]
        status = "ready" if served else "down" if down else "starting"
        told = {"status": status, "models": served} | ({"down": down} if down else {})
        return JSONResponse(told, 200 if served else 503, {} if served else {"Retry-After": f"{_START_RETRY_S}"})

    return router


class _Desk:
    def __init__(self, engines: Engines, config: SpinConfig, metrics: Metrics) -> None:
        self._engines, self.config, self.metrics = engines, config.serving, metrics
        self.slots = Slots(config.serving.max_concurrent)

    async def answer(self, operation: str, body: ChatBody | CompletionBody, request: HttpRequest) -> Response:
        self.check_length(body)
        iterate = self._engines.names.resolve(body.model)
        request.state.log |= {"model": iterate, "stream": bool(body.stream)}
        text = plain(body.messages) if isinstance(body, ChatBody) else body.prompt
        self.log_text(request, text)
        digest = self._engines.digest(iterate)
        headers = {DIGEST_HEADER: digest, ITERATE_HEADER: iterate}
        fields = body.for_engine(iterate, self.config.max_tokens)
        started = time.monotonic()
        held = AsyncExitStack()
        try:
            held.enter_context(self.slots.take(body.choices))
            answer: Any = self._engines.answer(iterate, operation, fields)
            items = _Until(await held.enter_async_context(aclosing(answer)), self.config.request_timeout_s)
            async with while_listened_to(request):
                first = await items.next()
            self.metrics.first_output(iterate, time.monotonic() - started)
            if first is None:
                raise no_answer()
            if isinstance(first, dict):
                if "error" in first:
                    raise from_engine(first["error"])
                return JSONResponse(first, headers=headers)
            return HeldStream(_events(first, items), held.pop_all(), headers, self.config.request_timeout_s)
        finally:
            await held.aclose()

    def check_length(self, body: Sampling) -> None:
        most, field = self.config.max_tokens, body.length_field
        if body.longest and body.longest > most:
            raise Refusal(400, f"{field}: {body.longest} is more than the {most} allowed here", param=field)

    def log_text(self, request: HttpRequest, text: Any) -> None:
        if self.config.log_prompts:
            request.state.log["prompt"] = text


class _Until:
    def __init__(self, items: AsyncIterator[Item], limit_s: float) -> None:
        self._items, self._limit_s = items, limit_s
        self._end = asyncio.get_running_loop().time() + limit_s

    async def next(self) -> Item | None:
        try:
            async with asyncio.timeout_at(self._end):
                return await anext(self._items, None)
        except TimeoutError:
            raise too_slow(self._limit_s) from None


async def _events(first: str, items: _Until) -> AsyncIterator[str]:
    item: Item | None = first
    try:
        while item is not None:
            if isinstance(item, dict):
                raise from_engine(item.get("error", {}))
            yield item
            item = await items.next()
    except Refusal as refusal:
        yield event(refusal.content()) + END


def _served(engines: Engines) -> list[str]:
    try:
        return [*engines.names.iterates, engines.names.newest() and LATEST]
    except UnknownModel:
        return list(engines.names.iterates)


def _card(engines: Engines, name: str) -> dict[str, Any]:
    iterate = engines.names.resolve(name)
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "spin_ray",
        "iterate": iterate,
        "digest": engines.digest(iterate),
    }


def _answer_errors(app: FastAPI) -> None:

    @app.exception_handler(Refusal)
    async def refused(_: HttpRequest, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(ModelStarts)
    async def starts(_: HttpRequest, error: ModelStarts) -> Response:
        return Refusal(503, str(error), code="model_starts", retry_s=_START_RETRY_S).response()

    @app.exception_handler(UnknownModel)
    async def unknown(_: HttpRequest, error: UnknownModel) -> Response:
        return Refusal(404, str(error), code="model_not_found", param="model").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        if "json" not in (given := request.headers.get("content-type", "")) and request.method == "POST":
            return Refusal(400, f"Content-Type: must be application/json, not {given or 'missing'}").response()
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        response = _routeless(app, request, error).response()
        response.headers.update(error.headers or {})
        return response


def _routeless(app: FastAPI, request: HttpRequest, error: HTTPException) -> Refusal:
    """Returns what a client is told whose request reached no route's code."""
    status, path = error.status_code, request.scope["path"][:_LONGEST_PATH]
    asked = f"{request.method} {path}"
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return Refusal(405, f"{asked}: use {allowed}", code="method_not_allowed")
    if status == 404:
        routes = [route.path for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema]
        there = list(dict.fromkeys(routes))
        hint = f"; there is /v1{path}: the client's base URL should end in /v1" if f"/v1{path}" in there else ""
        return Refusal(404, f"{asked}: is no route here{hint}. Routes: {', '.join(there)}", code="unknown_url")
    return Refusal(status, _UNREADABLE if status == 400 else str(error.detail))
