"""The arena: a page on which people compare two iterates, and the votes that come of it.

    POST /v1/battles -> two names that hide two iterates, and one seed for both
    the page asks each of them by POST /v1/chat/completions, streamed; ``recorded`` reads along
    POST /v1/votes   -> the verdict is kept, the names are revealed
    GET  /v1/leaderboard, /v1/votes/export

Who votes cannot change what was asked or answered, or by which checkpoint: the server keeps what it streamed, and a
vote brings a verdict only. What a voter *can* do, if they want to: vote without reading, vote often, or find out who is
who by asking a named iterate the same question with the same seed. Votes are worth as much as the people who have keys.
"""

import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from spin_ray.serving.arena import ratings
from spin_ray.serving.arena.ratings import Pairing, Rating
from spin_ray.serving.arena.votes import BATTLE_TTL_S, Answer, Verdict, VoteStore, is_side
from spin_ray.serving.bodies import ChatBody, Sampling, plain
from spin_ray.serving.errors import Refusal
from spin_ray.serving.names import Names

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
FILES = ("arena.css", "arena.js", "api.js", "leaderboard.js", "scores.js", "arena.svg")
"""Beside ``index.html``; a browser may load them before it has a key."""
_SAMPLING = {*Sampling.model_fields, "max_completion_tokens"}
_random = random.SystemRandom()

ModelName = Annotated[str, Field(min_length=1, max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class BattleRequest(_Body):
    models: Annotated[list[ModelName], Field(min_length=2, max_length=2)] | None = None
    """The two iterates to compare; any two that serve when not set. Sides are drawn by lot either way."""


class BattleReply(BaseModel):
    id: str
    a: str
    b: str
    seed: int
    expires_in_s: float


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
    ratings: list[Rating]
    pairs: list[Pairing]


def router(votes: VoteStore, names: Names) -> APIRouter:
    """The routes of the arena, for an application that serves ``/v1/chat/completions`` and ``/v1/models`` itself."""
    routes = APIRouter(tags=["arena"])
    for path, file in [("/", "index.html"), *((f"/{file}", file) for file in FILES)]:
        routes.add_api_route(path, _file(file), response_class=FileResponse, include_in_schema=False)

    @routes.post("/v1/battles", responses={409: {"description": "Fewer than two iterates serve"}})
    def start_battle(request: BattleRequest) -> BattleReply:
        """Draws two iterates, and the names under which they can be asked without being known."""
        battle = votes.start(*_draw(request.models, names))
        for alias, model in ((battle.a, battle.model_a), (battle.b, battle.model_b)):
            names.register_alias(alias, model, ttl_s=BATTLE_TTL_S)
        return BattleReply(id=battle.id, a=battle.a, b=battle.b, seed=battle.seed, expires_in_s=BATTLE_TTL_S)

    @routes.post(
        "/v1/votes",
        responses={
            409: {"description": "An answer is missing, or there is another vote"},
            410: {"description": "The comparison is too old"},
        },
    )
    def vote(request: VoteRequest) -> VoteReply:
        """Records which answer is better, and tells which iterate gave which. Once per comparison."""
        vote = votes.vote(request.battle, request.verdict)
        return VoteReply(
            battle=vote.battle,
            verdict=vote.verdict,
            a=SideReply(model=vote.model_a, digest=vote.digest_a),
            b=SideReply(model=vote.model_b, digest=vote.digest_b),
        )

    @routes.get("/v1/leaderboard")
    def leaderboard() -> Leaderboard:
        """Bradley-Terry ratings of all checkpoints that were voted on."""
        tallies = tuple(votes.tallies())
        return Leaderboard(
            votes=sum(tally.count for tally in tallies), ratings=ratings.rate(tallies), pairs=ratings.pairings(tallies)
        )

    @routes.get("/v1/votes/export", response_class=StreamingResponse)
    def export() -> StreamingResponse:
        """Pairs for preference training, as JSON lines; ties and "both bad" make none."""
        pairs = votes.export()
        first = list(islice(pairs, 1))  # a database that does not answer is told by the status, not by an empty file
        lines = (json.dumps(pair) + "\n" for pair in chain(first, pairs))
        return StreamingResponse(lines, media_type="application/jsonl")

    return routes


def _draw(models: list[str] | None, names: Names) -> tuple[str, str]:
    """Two iterates in an order that says nothing; always under their own names, as ``latest`` may move on."""
    if models is None:
        if len(names.iterates) < 2:
            raise Refusal(409, "A comparison needs two iterates that serve; there are fewer now")
        first, second = _random.sample(names.iterates, 2)
        return first, second
    if any(is_side(model) for model in models):
        raise Refusal(404, "models: a name that is hidden until the vote cannot be drawn again", param="models")
    first, second = _random.sample([names.resolve(model) for model in models], 2)
    if first == second:
        raise Refusal(409, f"Both names stand for {first}; a comparison needs two iterates")
    return first, second


def recall(alias: str, votes: VoteStore, names: Names) -> None:
    """Lets a side be asked that another replica drew, or this one before it was started again."""
    if model := votes.model_of(alias):
        names.register_alias(alias, model, ttl_s=BATTLE_TTL_S)


async def recorded(
    stream: AsyncIterator[str], votes: VoteStore, alias: str, body: ChatBody, digest: str
) -> AsyncIterator[str]:
    """Passes a streamed chat completion on as it is, and keeps a whole answer *before* its last event goes out.

    Whoever has seen ``data: [DONE]`` can vote. What breaks off (the reader left, the engine failed) is not kept.

    Args:
        stream: server-sent events of one chat completion, cut anywhere.
        alias: the name that was asked, ``battle-<id>-a`` or ``-b``.
        body: of the request.
        digest: of the checkpoint that answers.
    """
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
    """The text of a chat completion, put together from its events."""

    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    _rest: str = ""

    def read(self, chunk: str) -> bool:
        """Whether the stream ends in this chunk."""
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


def _file(name: str) -> Callable[[], FileResponse]:
    return lambda: FileResponse(STATIC / name)
