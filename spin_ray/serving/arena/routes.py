"""The routes of the arena.

A voter *can* vote often, and can unmask a side: a named iterate gives the same answer to the same question and seed.
"""

import json
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from hashlib import sha256
from itertools import islice
from mimetypes import guess_type
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from spin_ray.config.sections import ServingConfig
from spin_ray.serving.access import Key
from spin_ray.serving.arena.asking import both_sides
from spin_ray.serving.arena.battles import Question, Verdict
from spin_ray.serving.arena.ratings import APART, Pairing, Rating, lead
from spin_ray.serving.arena.threads import VoteThreads
from spin_ray.serving.arena.votes import EXPORT_ROWS, VoteStore
from spin_ray.serving.bodies import Conversation, Sampling, plain
from spin_ray.serving.engines import DOWN_RETRY_S, Engines
from spin_ray.serving.errors import Refusal
from spin_ray.serving.events import HeldStream
from spin_ray.serving.limits import Slots
from spin_ray.serving.metrics import Metrics
from spin_ray.serving.names import ModelStarts

STATIC = Path(__file__).parent / "static"
FILES = ("arena.css", "arena.js", "api.js", "leaderboard.js", "scores.js", "arena.svg")
"""Files beside ``index.html``; they need no key."""
MAX_TEMPERATURE = 2.0
"""Highest ``temperature`` that ``Sampling`` accepts."""
_random = random.SystemRandom()

ModelName = Annotated[str, Field(min_length=1, max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class BattleRequest(Sampling):
    """``POST /v1/battles``: one conversation and sampling for both sides."""

    messages: Conversation
    models: Annotated[list[ModelName], Field(min_length=2, max_length=2)] | None = None
    """The two iterates to compare; any two that serve when not set. Sides are drawn by lot."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of both sides; drawn when not set."""

    def question(self, max_tokens: int) -> Question:
        sampling = self.model_dump(exclude={"messages", "models"}, exclude_none=True)
        drawn = {"seed": secrets.randbelow(2**31), "max_tokens": max_tokens}
        return Question(plain(self.messages), drawn | sampling)


class ArenaLimits(BaseModel):
    max_tokens: int
    temperature: float
    """Highest temperature."""
    more_start: bool
    """True while further iterates start."""


class VoteRequest(_Body):
    battle: Annotated[str, Field(pattern="^[0-9a-f]{24}$")]
    verdict: Verdict


class SideReply(BaseModel):
    model: str
    digest: str


class VoteReply(BaseModel):
    battle: str
    verdict: Verdict
    a: SideReply
    b: SideReply


class Leaderboard(BaseModel):
    votes: int
    told_apart_from: float
    """Value of ``above_next`` and ``a_above`` from which on (or up to 1 minus which) two are told apart."""
    ratings: list[Rating]
    pairs: list[Pairing]


class Desk(Protocol):
    """The limits that the arena shares with the other routes."""

    slots: Slots
    metrics: Metrics
    config: ServingConfig

    def check_length(self, body: Sampling) -> None: ...

    def log_text(self, request: HttpRequest, text: Any) -> None: ...


def arena_router(votes: VoteStore, engines: Engines, desk: Desk) -> APIRouter:
    routes = APIRouter(tags=["arena"])
    for path, file in [("/", "index.html"), *((f"/{file}", file) for file in FILES)]:
        routes.add_api_route(path, _file(file), response_class=Response, include_in_schema=False)
    threads = VoteThreads()
    _add_comparing(routes, votes, threads, engines, desk)
    _add_voting(routes, votes, threads)
    return routes


def _add_comparing(routes: APIRouter, votes: VoteStore, threads: VoteThreads, engines: Engines, desk: Desk) -> None:
    @routes.get("/v1/arena")
    async def limits() -> ArenaLimits:
        """Gives the limits of a comparison, and says whether there are more iterates to come."""
        return ArenaLimits(
            max_tokens=desk.config.max_tokens, temperature=MAX_TEMPERATURE, more_start=engines.names.may_grow
        )

    @routes.post(
        "/v1/battles",
        response_class=StreamingResponse,
        responses={
            200: {"description": "Events of both sides", "content": {"text/event-stream": {}}},
            409: {"description": "The server has fewer than two iterates, or both names stand for one"},
            503: {
                "description": "An iterate starts or its engine is down, no place is free, or the votes' database fails"
            },
        },
    )
    async def battle(body: BattleRequest, request: HttpRequest) -> StreamingResponse:
        """Draws two iterates, asks both the same and streams both answers, each event with its side."""
        desk.check_length(body)
        models = _draw(body.models, engines)
        request.state.log |= {"model": ",".join(sorted(models)), "stream": True}
        question = body.question(desk.config.max_tokens)
        desk.log_text(request, question.messages)
        async with AsyncExitStack() as held:
            held.enter_context(desk.slots.take(len(models)))
            drawn = await threads.run(votes.start, *models, question)
            request.state.log["battle"] = drawn.id
            held.push_async_callback(_forget_unanswered, votes, threads, drawn.id)
            record = partial(threads.run, votes.record)
            events = both_sides(engines, record, desk.metrics, drawn, desk.config.request_timeout_s)
            await held.enter_async_context(aclosing(events))
            return HeldStream(events, held.pop_all(), {}, desk.config.request_timeout_s)


def _add_voting(routes: APIRouter, votes: VoteStore, threads: VoteThreads) -> None:
    @routes.post(
        "/v1/votes",
        responses={
            409: {"description": "An answer is missing, or there is another vote"},
            410: {"description": "The comparison is too old"},
        },
    )
    async def vote(body: VoteRequest, request: HttpRequest) -> VoteReply:
        """Records the verdict and the name of the voter's key, once per comparison, and reveals the iterates."""
        request.state.log["battle"] = body.battle
        key: Key | None = request.state.key
        vote = await threads.run(votes.vote, body.battle, body.verdict, key.name if key else None)
        return VoteReply(
            battle=vote.battle,
            verdict=vote.verdict,
            a=SideReply(model=vote.model_a, digest=vote.digest_a),
            b=SideReply(model=vote.model_b, digest=vote.digest_b),
        )

    @routes.get("/v1/leaderboard")
    async def leaderboard() -> Leaderboard:
        """Rates all checkpoints that were voted on (Bradley-Terry)."""
        tallies = tuple(await threads.run(votes.tallies))
        leaders = await run_in_threadpool(lead, tallies)
        return Leaderboard(
            votes=sum(tally.count for tally in tallies), told_apart_from=APART, ratings=leaders.ratings,
            pairs=leaders.pairs,
        )  # fmt: skip

    @routes.get(
        "/v1/votes/export",
        response_class=StreamingResponse,
        responses={200: {"description": "One pair a line", "content": {"application/jsonl": {}}}},
    )
    async def export(request: HttpRequest) -> StreamingResponse:
        """Gives the votes as pairs for preference training, as JSON lines, without ties and "both bad".

        A key needs the permission ``export``, as the pairs are everybody's conversations.
        """
        key: Key | None = request.state.key
        if key and not key.may_export:
            raise Refusal(
                403, f"The key {key.name} may not export conversations; its line in serving.keys lacks `export`"
            )
        pairs = votes.export()
        read = partial(threads.run, lambda: "".join(json.dumps(pair) + "\n" for pair in islice(pairs, EXPORT_ROWS)))
        first = await read()  # a failing database must show in the status
        return StreamingResponse(_pieces(first, read), media_type="application/jsonl")


async def _forget_unanswered(votes: VoteStore, threads: VoteThreads, battle: str) -> None:
    with suppress(Refusal):  # it is deleted when it is too old for a vote
        await threads.run(votes.drop_unanswered, battle)


def _draw(models: list[str] | None, engines: Engines) -> tuple[str, str]:
    """Returns two iterates in random order; resolves ``latest``, which may move on.

    Raises:
        ModelStarts: an iterate starts without which there are fewer than two.
        UnknownModel: a named one does not serve.
        Refusal: an engine is down (503), or there are not two iterates (409).
    """
    known = list(engines.names.iterates) if models is None else [engines.names.resolve(model) for model in models]
    if len(known) < 2:
        if engines.names.may_grow:
            raise ModelStarts("A comparison needs two iterates; one still starts; ask again in a moment")
        raise Refusal(409, "A comparison needs two iterates; this server has fewer")
    first, second = known[:2]
    if first == second:
        raise Refusal(409, f"Both names stand for {first}; a comparison needs two iterates")
    up = [iterate for iterate in known if iterate not in engines.down]
    if len(up) < 2:
        raise Refusal(
            503, "An engine is down and starts again; ask again in a moment", code="engine_down", retry_s=DOWN_RETRY_S
        )
    first, second = _random.sample(up, 2)
    return first, second


async def _pieces(first: str, read: Callable[[], Awaitable[str]]) -> AsyncIterator[str]:
    """Yields ``first`` and what ``read`` returns, up to an empty text."""
    piece = first
    while piece:
        yield piece
        piece = await read()


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    """Returns a route that needs neither thread nor disk, so that the page opens whatever else waits."""
    content, (media_type, _) = (STATIC / name).read_bytes(), guess_type(name)
    headers = {"ETag": f'"{sha256(content).hexdigest()[:32]}"'}

    async def file() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return file
