"""Every refusal of the arena, provoked and replayed."""

import ast
import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from spin_ray.serving import arena, errors
from spin_ray.serving.access import Key, new_key
from spin_ray.serving.api import make_app
from spin_ray.serving.arena.battles import BATTLE_TTL_S, Question
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.engines import Item
from tests.serving.test_arena_api import ASKED, app, events_of, fight, voted
from tests.support.arena_app import ITERATES, TalkingEngines
from tests.support.tiny_runs import tiny_config


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def ask(client, **changes: Any) -> httpx.Response:
    return client.post("/v1/battles", json=ASKED | changes)


def alone(_: TestClient, engines: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    engines.names.serve_now(["sft"], newest="sft")
    return lambda: ask(app(engines, votes))


def down(_: TestClient, engines: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    engines.down = set(ITERATES[1:])
    return lambda: ask(app(engines, votes))


def vanished(_: TestClient, engines: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    client = app(engines, votes)
    start = votes.start

    def start_and_go(*given: Any) -> Any:
        engines.names.serve_now(["sft"], newest=None)
        return start(*given)

    def ask_with_a_loss() -> httpx.Response:
        engines.names.serve_now(ITERATES, newest=ITERATES[-1])
        votes.start = start_and_go
        return ask(client, models=["sft", "iter-1"])

    return ask_with_a_loss


def slow(_: TestClient, engines: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    engines.gate.clear()
    return lambda: ask(app(engines, votes, request_timeout_s=0.1))


def broken(error: Exception | None) -> Callable[..., Callable[[], httpx.Response]]:
    async def answer(*_: Any) -> AsyncIterator[Item]:
        if error:
            raise error
        yield "data: [DONE]\n\n"

    def prepare(_: TestClient, engines: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
        engines.answer = answer
        return lambda: ask(app(engines, votes))

    return prepare


def unanswered(client: TestClient, _: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    battle = votes.start("sft", "iter-1", Question([], {"seed": 1}))
    return lambda: voted(client, battle.id)


def other_vote(client: TestClient, *_: Any) -> Callable[[], httpx.Response]:
    battle, _ = fight(client)
    voted(client, battle, "a").raise_for_status()
    return lambda: voted(client, battle, "b")


def too_old(client: TestClient, _: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    battle, _ = fight(client)
    votes._clock.now += BATTLE_TTL_S + 1
    return lambda: voted(client, battle)


def no_database(client: TestClient, _: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    file = Path(votes._engine.url.database)
    votes.close()
    file.write_bytes(b"no database any more" * 1000)
    return lambda: ask(client)


def without_permission(_: TestClient, engines: TalkingEngines, votes: VoteStore) -> Callable[[], httpx.Response]:
    key, line = new_key("alice")
    client = TestClient(make_app(engines, tiny_config(), [Key(*line.split(), None)], votes))
    return lambda: client.get("/v1/votes/export", headers={"Authorization": f"Bearer {key}"})


REFUSALS = {
    "A comparison needs two iterates; this server has fewer": (409, alone),
    "An engine is down and starts again": (503, down),
    "Both names stand for iter-1": (409, lambda client, *_: lambda: ask(client, models=["iter-1", "latest"])),
    "This comparison does not exist": (404, lambda client, *_: lambda: voted(client, "0" * 24)),
    "This comparison is too old": (410, too_old),
    "has not been streamed to its end": (409, unanswered),
    "This comparison was voted on before": (409, other_vote),
    "may not export conversations": (403, without_permission),
    "Votes cannot be stored or read now": (503, no_database),
    "This iterate serves no more": (503, vanished),
    "The answer took longer than": (504, slow),
    "the engine ended without an answer": (500, broken(None)),
    "an error here, not in the request": (500, broken(ZeroDivisionError())),
}


@pytest.mark.parametrize("says", REFUSALS)
def test_a_refusal_that_is_replayed_is_the_same_and_changes_nothing(tmp_path, says):
    """Every refusal of the arena, three times over: of a request, or as the event of a side."""
    status, prepare = REFUSALS[says]
    votes, engines = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite", Clock()), TalkingEngines()
    again = prepare(app(engines, votes), engines, votes)
    counted = None if prepare is no_database else (votes.tallies(), list(votes.export()))
    told = {str(refusal_of(again())) for _ in range(3)}
    ((message, kind),) = {ast.literal_eval(each) for each in told}
    assert says in message and kind == (status if isinstance(kind, int) else KINDS[status])
    assert counted is None or (votes.tallies(), list(votes.export())) == counted
    votes.close()


def test_an_error_in_a_comparison_is_in_the_log_to_which_it_points(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    votes, engines = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite"), TalkingEngines()
    broken(ZeroDivisionError())(app(engines, votes), engines, votes)()
    assert {record.name for record in caplog.records if record.exc_info} == {"ray.serve"}
    votes.close()


KINDS = {500: "server_error", 503: "overloaded_error", 504: "timeout_error"}


def refusal_of(response: httpx.Response) -> tuple[str, int | str]:
    """Returns message and status, or message and type of the first side's event that has an error."""
    if response.status_code != 200:
        return response.json()["error"]["message"], response.status_code
    error = next(event["error"] for event in events_of(response) if "error" in event)
    return error["message"], error["type"]


def test_every_refusal_in_the_arenas_source_is_replayed():
    """Those of the whole server stand in ``errors``, by name."""
    shared = {
        name: inspect.getsource(function)
        for name, function in vars(errors).items()
        if inspect.isfunction(function) and function.__annotations__.get("return") is errors.Refusal
        if not name.startswith("from_")  # the text is the engine's
    }
    calls = [
        (getattr(node.func, "id", ""), node)
        for file in Path(arena.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    words = [ast.unparse(call.args[1]) for name, call in calls if name == "Refusal"]
    words += [shared[name] for name, _ in calls if name in shared]
    missing = [told for told in words if not any(says.replace("iter-1", "{first}") in told for says in REFUSALS)]
    assert len(words) == len(REFUSALS) and missing == []
