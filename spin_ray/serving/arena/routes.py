"""The routes of the arena.

The page asks both blind names of a battle by ``/v1/chat/completions``; ``recorded`` reads along. A voter *can* vote
often, or unmask a side by asking a named iterate the same with the same seed.
"""

import json
import random
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from spin_ray.serving.arena import ratings
from spin_ray.serving.arena.battles import BATTLE_TTL_S, Verdict, is_side
from spin_ray.serving.arena.ratings import Pairing, Rating
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.errors import Refusal
from spin_ray.serving.names import Names

STATIC = Path(__file__).parent / "static"
FILES = ("arena.css", "arena.js", "api.js", "leaderboard.js", "scores.js", "arena.svg")
"""Files beside ``index.html``; they need no key."""
_random = random.SystemRandom()

ModelName = Annotated[str, Field(min_length=1, max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class BattleRequest(_Body):
    models: Annotated[list[ModelName], Field(min_length=2, max_length=2)] | None = None
    """The two iterates to compare; any two that serve when not set. Sides are drawn by lot."""


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


def arena_router(votes: VoteStore, names: Names) -> APIRouter:
    routes = APIRouter(tags=["arena"])
    for path, file in [("/", "index.html"), *((f"/{file}", file) for file in FILES)]:
        routes.add_api_route(path, _file(file), response_class=FileResponse, include_in_schema=False)

    @routes.post("/v1/battles", responses={409: {"description": "Fewer than two iterates serve"}})
    def start_battle(request: BattleRequest) -> BattleReply:
        """Draws two iterates and their blind names."""
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
        """Records the verdict, once per comparison, and reveals the iterates."""
        vote = votes.vote(request.battle, request.verdict)
        return VoteReply(
            battle=vote.battle,
            verdict=vote.verdict,
            a=SideReply(model=vote.model_a, digest=vote.digest_a),
            b=SideReply(model=vote.model_b, digest=vote.digest_b),
        )

    @routes.get("/v1/leaderboard")
    def leaderboard() -> Leaderboard:
        """Rates all checkpoints that were voted on (Bradley-Terry)."""
        tallies = tuple(votes.tallies())
        return Leaderboard(
            votes=sum(tally.count for tally in tallies), ratings=ratings.rate(tallies), pairs=ratings.pairings(tallies)
        )

    @routes.get("/v1/votes/export", response_class=StreamingResponse)
    def export() -> StreamingResponse:
        """Gives the votes as pairs for preference training, as JSON lines, without ties and "both bad"."""
        pairs = votes.export()
        first = list(islice(pairs, 1))  # a failing database must show in the status
        lines = (json.dumps(pair) + "\n" for pair in chain(first, pairs))
        return StreamingResponse(lines, media_type="application/jsonl")

    return routes


def _draw(models: list[str] | None, names: Names) -> tuple[str, str]:
    """Draws two iterates, by their own names, as ``latest`` may move on."""
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


def recall_side(alias: str, votes: VoteStore, names: Names) -> None:
    """Registers a side drawn by another replica or before a restart."""
    if model := votes.model_of(alias):
        names.register_alias(alias, model, ttl_s=BATTLE_TTL_S)


def _file(name: str) -> Callable[[], FileResponse]:
    return lambda: FileResponse(STATIC / name)
