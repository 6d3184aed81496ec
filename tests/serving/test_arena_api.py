"""The arena's routes over engines that say a sentence each: what a voter can and cannot do."""

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from spin_ray.serving.access import Key, new_key
from spin_ray.serving.api import make_app
from spin_ray.serving.arena.routes import FILES
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.engines import Item
from spin_ray.serving.errors import Refusal
from spin_ray.serving.limits import access_log
from tests.support.arena_app import SAYS, TalkingEngines, digest, make
from tests.support.paths import ROOT
from tests.support.ray_head import free_port
from tests.support.tiny_runs import tiny_config

ASKED = {"messages": [{"role": "user", "content": "how are you?"}], "temperature": 0.8, "seed": 3}


@pytest.fixture
def client(votes):
    return TestClient(make(votes), base_url="http://localhost")


def fight(client, **wish) -> tuple[str, dict[str, str]]:
    """Streams both answers of a new comparison; returns its id, and the text of each side, as the page joins it."""
    first, *events = events_of(client.post("/v1/battles", json=ASKED | wish).raise_for_status())
    return first["battle"], {
        side: "".join(event.get("text", "") for event in events if event["side"] == side) for side in "ab"
    }


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def voted(client, battle: str, verdict: str = "a") -> httpx.Response:
    return client.post("/v1/votes", json={"battle": battle, "verdict": verdict})


def test_a_blind_comparison_from_draw_to_leaderboard_and_export(client):
    battle, _ = fight(client, models=["sft", "iter-1"])
    vote = voted(client, battle).raise_for_status().json()
    assert {vote["a"]["model"], vote["b"]["model"]} == {"sft", "iter-1"}
    assert vote["a"]["digest"] == digest(vote["a"]["model"])
    board = client.get("/v1/leaderboard").json()
    assert board["votes"] == 1 and board["ratings"][0]["model"] == vote["a"]["model"]
    assert board["pairs"][0]["a_wins"] + board["pairs"][0]["b_wins"] == 1
    exported = client.get("/v1/votes/export")
    assert exported.headers["content-type"].startswith("application/jsonl")
    (pair,) = map(json.loads, exported.text.splitlines())
    assert pair["chosen"][-1]["content"] == SAYS[vote["a"]["model"]]
    assert pair["rejected"][-1]["content"] == SAYS[vote["b"]["model"]]
    assert pair["chosen"][:-1] == ASKED["messages"]
    assert pair["sampling"] == {"temperature": 0.8, "seed": 3, "max_tokens": 1024}
    assert pair["voter"] is None


def test_a_vote_names_its_key_which_needs_a_permission_to_export(votes, caplog):
    """The access log has the comparison of both requests; only the key with ``export`` reads the conversations."""
    (alice, hers), (bob, his) = new_key("alice"), new_key("bob", may_export=True)
    keys = [Key(*hers.split(), None), Key(*his.split()[:2], None, may_export=True)]
    client = TestClient(make(votes, keys=keys), base_url="http://localhost")
    client.headers["Authorization"] = f"Bearer {alice}"
    with caplog.at_level(logging.INFO, access_log.name):
        battle, _ = fight(client)
        voted(client, battle).raise_for_status()
    assert [json.loads(line)["battle"] for line in caplog.messages if '"key": "alice"' in line] == [battle] * 2
    refused = client.get("/v1/votes/export")
    assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
    client.headers["Authorization"] = f"Bearer {bob}"
    (pair,) = map(json.loads, client.get("/v1/votes/export").raise_for_status().text.splitlines())
    assert pair["voter"] == "alice"


def test_the_page_is_whole_without_a_key_and_asks_no_other_host(votes):
    """Every file that the page and its modules name is served; none is elsewhere, inline, or makes markup of text."""
    client = TestClient(make(votes, keys=[Key("alice", "0" * 64, None)]), base_url="http://localhost")
    assert client.get("/v1/models").status_code == 401
    wanted, seen = ["/"], {}
    while wanted:
        path = wanted.pop()
        seen[path] = client.get(path).raise_for_status()
        named = re.findall(r'(?:src|href)="(?!#)\.?(.*?)"|from "\.(.*?)"', seen[path].text)
        wanted += {one or other for one, other in named} - set(seen)
    assert set(seen) == {"/", *(f"/{file}" for file in FILES)}
    text = "".join(response.text for response in seen.values())
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|<style|style=|\bon\w+=\"|@import|eval\(", text
    )
    assert "default-src 'self'" in seen["/"].headers["content-security-policy"]


def test_nothing_names_an_iterate_before_the_vote(client):
    told = client.post("/v1/battles", json=ASKED).text
    assert not [name for name in SAYS if name in told or digest(name) in told]


def test_sides_are_drawn_by_lot_also_when_the_pair_was_chosen(client):
    """24 draws of one pair: one order alone has probability 2^-23."""
    firsts = set()
    for _ in range(24):
        battle, _ = fight(client, models=["sft", "iter-1"])
        firsts.add(voted(client, battle, "tie").json()["a"]["model"])
    assert firsts == {"sft", "iter-1"}


def test_latest_is_drawn_as_the_iterate_that_it_is(client):
    battle, _ = fight(client, models=["sft", "latest"])
    vote = voted(client, battle, "tie").json()
    assert {vote["a"]["model"], vote["b"]["model"]} == {"sft", "iter-1"}


@pytest.mark.parametrize(
    ("models", "status"),
    [(["sft", "sft"], 409), (["iter-1", "latest"], 409), (["sft", "iter-9"], 404), (["sft"], 400), (["sft", ""], 400)],
)
def test_a_comparison_needs_two_iterates_that_serve(client, models, status):
    assert client.post("/v1/battles", json=ASKED | {"models": models}).status_code == status


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"battle": "x", "verdict": "a"},
        {"battle": "0" * 24, "verdict": "A"},
        {"battle": "0" * 24, "verdict": "a", "answers": {"a": "forged"}},
        {"battle": "0" * 10_000, "verdict": "a"},
        {"battle": None, "verdict": ["a"]},
        [],
    ],
)
def test_a_vote_is_a_comparison_and_a_verdict_and_nothing_else(client, body):
    assert client.post("/v1/votes", json=body).status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/v1/votes", {"battle": "x", "verdict": "a"}, "battle: must match ^[0-9a-f]{24}$"),
        ("/v1/battles", ASKED | {"models": ["sft", ""]}, "models.1: must not be empty"),
        ("/v1/battles", ASKED | {"seed": 2**31}, "seed: must be less than 2147483648"),
    ],
)
def test_a_mistake_in_a_comparison_or_vote_is_told_in_words(client, path, body, told):
    assert client.post(path, json=body).json()["error"]["message"] == told


def test_a_comparison_is_voted_on_at_every_replica_and_after_a_restart(client, votes):
    battle, _ = fight(client)
    other = TestClient(make(votes), base_url="http://localhost")
    assert voted(other, battle).status_code == 200


class Recorder(TalkingEngines):
    """Engines that keep what they were asked, and may say one text each in given pieces."""

    def __init__(self, pieces: list[str] | None = None) -> None:
        super().__init__()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.pieces = pieces

    async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
        self.asked.append((iterate, fields))
        if self.pieces is None:
            async for item in super().answer(iterate, operation, fields):
                yield item
            return
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in self.pieces]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield "".join(f"data: {json.dumps(event)}\n\n" for event in events[:2])
        for event in events[2:]:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"


def app(engines: TalkingEngines, votes: VoteStore, **serving: Any) -> TestClient:
    return TestClient(make_app(engines, tiny_config(**serving), [], votes), base_url="http://localhost")


def test_both_sides_are_asked_the_same_of_one_stored_request(votes):
    engines = Recorder()
    asked = ASKED | {"top_p": 0.9, "stop": ["\n\n"], "models": ["sft", "iter-1"]}
    del asked["seed"]
    first, *_ = events_of(app(engines, votes).post("/v1/battles", json=asked))
    sides = [(iterate, fields.pop("model"), fields) for iterate, fields in engines.asked]
    assert {(iterate, model) for iterate, model, _ in sides} == {("sft", "sft"), ("iter-1", "iter-1")}
    (_, _, one), (_, _, other) = sides
    assert one == other == {
        "messages": ASKED["messages"], "temperature": 0.8, "top_p": 0.9, "stop": ["\n\n"], "max_tokens": 1024,
        "seed": first["seed"], "n": 1, "stream": True,
    }  # fmt: skip


@pytest.mark.parametrize("changed", [{"n": 2}, {"stream": False}, {"seed_b": 1}, {"seed": 2**31}])
def test_a_comparison_takes_nothing_that_could_differ(client, changed):
    assert client.post("/v1/battles", json=ASKED | changed).status_code == 400


def test_an_exported_pair_is_what_was_shown_byte_for_byte(votes):
    pieces = [" \t", "\r\n", "", "é\u0301 👩‍👩‍👧 ", "\u2028\0\u200f", "data: [DONE]\n\n", "\\ud800 <b>", "  \n"]
    client = app(Recorder(pieces), votes)
    question = " \n first\u2028line\r\n\t"
    battle, shown = fight(client, messages=[{"role": "user", "content": question}])
    assert set(shown.values()) == {"".join(pieces)}
    voted(client, battle).raise_for_status()
    (pair,) = map(json.loads, client.get("/v1/votes/export").text.split("\n")[:-1])
    for role in ("chosen", "rejected"):
        asked, answer = pair[role]
        assert (asked["content"], answer["content"]) == (question, "".join(pieces))


def test_a_side_that_fails_is_told_without_its_name_and_costs_the_vote(votes):
    class Down(TalkingEngines):
        async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
            if iterate == "sft":
                yield {"error": {"code": 503, "message": "sft is down: its engine starts again"}}
                return
            async for item in super().answer(iterate, operation, fields):
                yield item

    client = app(Down(), votes)
    battle, *events = events_of(client.post("/v1/battles", json=ASKED | {"models": ["sft", "iter-1"]}))
    ends = {event["side"]: event for event in events if "text" not in event}
    (failed,) = [side for side, event in ends.items() if "error" in event]
    assert ends[failed]["error"]["message"] == "this side's iterate is down: its engine starts again"
    assert "sft" not in json.dumps([battle, events])
    assert voted(client, battle["battle"]).status_code == 404
    assert rows(votes) == 0


def test_a_side_whose_adapter_cannot_be_loaded_is_told_without_the_path_that_names_it(votes):
    class Unloadable(TalkingEngines):
        async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
            if iterate == "iter-1":
                message = "iter-1 cannot answer: /r/iter_001/adapter: is no adapter of the model"
                raise Refusal(404, message, code="model_not_found")
            async for item in super().answer(iterate, operation, fields):
                yield item

    client = app(Unloadable(), votes)
    told = events_of(client.post("/v1/battles", json=ASKED | {"models": ["sft", "iter-1"]}))
    (error,) = [event["error"]["message"] for event in told if "error" in event]
    assert error == "This iterate serves no more; start a new comparison"
    assert "iter" not in json.dumps(told).replace(error, "")


def test_an_answer_that_cannot_be_kept_is_shown_and_told(votes, tmp_path):
    """The database breaks while both answer: a voter learns at once that a vote cannot count."""

    class Breaking(TalkingEngines):
        async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
            votes.close()
            (tmp_path / "votes.sqlite").write_bytes(b"no database any more" * 1000)
            async for item in super().answer(iterate, operation, fields):
                yield item

    _, *events = events_of(app(Breaking(), votes).post("/v1/battles", json=ASKED | {"models": ["sft", "iter-1"]}))
    said = {"".join(event.get("text", "") for event in events if event["side"] == side) for side in "ab"}
    assert said == {SAYS["sft"], SAYS["iter-1"]}
    errors = [event["error"]["message"] for event in events if "error" in event]
    assert len(errors) == 2 and all("cannot be stored" in error for error in errors)


def test_iterates_that_are_down_are_not_drawn(votes):
    engines = TalkingEngines()
    engines.down = {"iter-0"}
    client = app(engines, votes)
    for _ in range(12):
        battle, _ = fight(client)
        vote = voted(client, battle, "tie").json()
        assert {vote["a"]["model"], vote["b"]["model"]} == {"sft", "iter-1"}


def rows(votes: VoteStore) -> int:
    """Returns the number of comparisons in the database."""
    with votes._engine.connect() as connection:
        return connection.exec_driver_sql("SELECT COUNT(*) FROM battles").scalar_one()


@pytest.mark.parametrize(
    ("serve", "starting", "down", "models", "status", "code"),
    [
        (["sft", "iter-0"], [], {"sft"}, None, 503, "engine_down"),
        (["sft", "iter-0"], [], {"sft"}, ["sft", "iter-0"], 503, "engine_down"),
        (["sft"], ["iter-0"], set(), None, 503, "model_starts"),
        (["sft"], ["iter-0"], set(), ["sft", "iter-0"], 503, "model_starts"),
        ([], ["sft"], set(), None, 503, "model_starts"),
        (["sft"], ["sft"], set(), None, 409, None),
        (["sft"], [], {"sft"}, None, 409, None),
    ],
)
def test_a_comparison_that_will_be_possible_is_a_503_that_says_when(votes, serve, starting, down, models, status, code):
    """409 only where no second iterate is to come. ``more_start`` tells the page."""
    engines = TalkingEngines()
    engines.names.serve_now(serve, newest=None, starting=starting)
    engines.down = down
    client = app(engines, votes)
    refused = client.post("/v1/battles", json=ASKED | ({"models": models} if models else {}))
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), refused.text
    assert ("retry-after" in refused.headers) == (status == 503)
    assert client.get("/v1/arena").json()["more_start"] == (code == "model_starts")
    assert rows(votes) == 0


def test_a_comparison_takes_two_places_and_gives_them_back(votes):
    client = app(TalkingEngines(), votes, max_concurrent=2)
    for _ in range(3):
        fight(client)
    alone = app(TalkingEngines(), votes, max_concurrent=1).post("/v1/battles", json=ASKED)
    assert alone.status_code == 400 and "2 answers" in alone.text
    assert rows(votes) == 3


def test_limits_come_from_the_server(votes):
    client = app(TalkingEngines(), votes, max_tokens=99)
    assert client.get("/v1/arena").json() == {"max_tokens": 99, "temperature": 2.0, "more_start": False}
    over = [{"max_tokens": 100}, {"temperature": 2.01}]
    assert [client.post("/v1/battles", json=ASKED | each).status_code for each in over] == [400, 400]


def test_a_client_that_leaves_aborts_both_answers(votes):
    """The stream is closed after its first piece; both engines' requests are closed with it."""
    open_now = set()

    class Slow(TalkingEngines):
        async def answer(self, iterate: str, operation: str, fields: dict[str, Any]) -> AsyncIterator[Item]:
            open_now.add(iterate)
            try:
                async for item in super().answer(iterate, operation, fields):
                    yield item
                    await asyncio.sleep(30)
            finally:
                open_now.discard(iterate)

    async def leave() -> None:
        body = json.dumps(ASKED).encode()
        received = [{"type": "http.request", "body": body, "more_body": False}]
        answered = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if received:
                return received.pop()
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if b'"text"' in message.get("body", b""):
                assert open_now
                answered.set()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/battles", "query_string": b"", "http_version": "1.1",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await asyncio.wait_for(make_app(Slow(), tiny_config(), [], votes)(scope, receive, send), 10)
        assert open_now == set()

    asyncio.run(leave())
    assert rows(votes) == 0


def test_a_database_that_does_not_answer_is_503(client, votes, tmp_path):
    votes.close()
    (tmp_path / "votes.sqlite").write_bytes(b"no database any more" * 1000)
    for method, path, body in (
        ("POST", "/v1/battles", ASKED),
        ("POST", "/v1/votes", {"battle": "0" * 24, "verdict": "a"}),
        ("GET", "/v1/leaderboard", None),
        ("GET", "/v1/votes/export", None),
    ):
        answer = client.request(method, path, json=body)
        assert (answer.status_code, answer.headers.get("retry-after")) in [(503, "5"), (503, "6"), (503, "7")], path


@pytest.mark.slow
def test_a_killed_server_has_lost_no_vote_that_it_acknowledged(tmp_path):
    """SIGKILL in the middle of votes from four voters; the file knows each of them."""
    database = f"sqlite:///{tmp_path}/votes.sqlite"
    server, url = started(database)
    acknowledged: set[str] = set()

    def voter() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            try:
                while True:
                    battle, _ = fight(client)
                    if voted(client, battle).status_code == 200:
                        acknowledged.add(battle)
            except httpx.TransportError:
                return  # the server is gone

    voters = [threading.Thread(target=voter) for _ in range(4)]
    for thread in voters:
        thread.start()
    deadline = time.monotonic() + 60
    while len(acknowledged) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.kill()
    server.wait()
    for thread in voters:
        thread.join(30)
    assert len(acknowledged) >= 20
    votes = VoteStore(database)
    kept = [pair["battle"] for pair in votes.export()]
    assert acknowledged <= set(kept) and len(kept) == len(set(kept)) == sum(tally.count for tally in votes.tallies())
    votes.close()


def started(database: str) -> tuple[subprocess.Popen, str]:
    """Starts the application as a process of its own; returns once it answers."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.support.arena_app", database, str(port)], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            httpx.get(f"{url}/v1/models")
            return server, url
        except httpx.TransportError:
            time.sleep(0.1)
    server.kill()
    raise AssertionError("the server did not start")
