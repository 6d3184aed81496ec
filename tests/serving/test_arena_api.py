"""The arena's routes over engines that say a sentence each: what a voter can and cannot do."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi.testclient import TestClient

from spin_ray.serving.access import Key
from spin_ray.serving.arena.recording import recorded
from spin_ray.serving.arena.routes import FILES
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.bodies import ChatBody
from tests.support.arena_app import SAYS, digest, make, says
from tests.support.paths import ROOT

ASKED = {"messages": [{"role": "user", "content": "how are you?"}], "temperature": 0.8, "seed": 3, "stream": True}


@pytest.fixture
def client(votes):
    return TestClient(make(votes), base_url="http://localhost")


def fight(client, **wish) -> tuple[dict, dict[str, str]]:
    """Streams both answers of a new comparison; returns the comparison, and the stream of each side."""
    battle = client.post("/v1/battles", json=wish).raise_for_status().json()
    said = {side: client.post("/v1/chat/completions", json=ASKED | {"model": battle[side]}).text for side in "ab"}
    return battle, said


def test_a_blind_comparison_from_draw_to_leaderboard_and_export(client):
    battle, _ = fight(client, models=["sft", "iter-1"])
    vote = client.post("/v1/votes", json={"battle": battle["id"], "verdict": "a"}).raise_for_status().json()
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
    assert pair["sampling"] == {"temperature": 0.8, "seed": 3}


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
    battle, said = fight(client)
    told = json.dumps([battle, said])
    assert not [name for name in SAYS if name in told or digest(name) in told]


def test_sides_are_drawn_by_lot_also_when_the_pair_was_chosen(client):
    """24 draws of one pair: one order alone has probability 2^-23."""
    firsts = set()
    for _ in range(24):
        battle, _ = fight(client, models=["sft", "iter-1"])
        firsts.add(client.post("/v1/votes", json={"battle": battle["id"], "verdict": "tie"}).json()["a"]["model"])
    assert firsts == {"sft", "iter-1"}


def test_latest_is_drawn_as_the_iterate_that_it_is(client):
    battle, _ = fight(client, models=["sft", "latest"])
    vote = client.post("/v1/votes", json={"battle": battle["id"], "verdict": "tie"}).json()
    assert {vote["a"]["model"], vote["b"]["model"]} == {"sft", "iter-1"}


@pytest.mark.parametrize(
    ("models", "status"),
    [(["sft", "sft"], 409), (["iter-1", "latest"], 409), (["sft", "iter-9"], 404), (["sft"], 400), (["sft", ""], 400)],
)
def test_a_comparison_needs_two_iterates_that_serve(client, models, status):
    assert client.post("/v1/battles", json={"models": models}).status_code == status


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


def test_a_hidden_name_is_known_to_every_replica_and_after_a_restart(client, votes):
    battle = client.post("/v1/battles", json={}).json()
    other = TestClient(make(votes), base_url="http://localhost")
    for side in "ab":
        assert "[DONE]" in other.post("/v1/chat/completions", json=ASKED | {"model": battle[side]}).text
    assert other.post("/v1/votes", json={"battle": battle["id"], "verdict": "tie"}).status_code == 200
    unknown = ASKED | {"model": f"battle-{'0' * 24}-a"}
    assert other.post("/v1/chat/completions", json=unknown).status_code == 404


def test_a_hidden_name_cannot_be_asked_where_answers_tell_names(client):
    battle = client.post("/v1/battles", json={}).json()
    compared = {"models": [battle["a"], "sft"], "messages": ASKED["messages"]}
    answer = client.post("/v1/compare", json=compared)
    assert answer.status_code == 400 and "hidden until the vote" in answer.text
    for other in SAYS:  # "both names stand for" would tell
        answer = client.post("/v1/battles", json={"models": [battle["a"], other]})
        assert answer.status_code == 404 and "hidden until the vote" in answer.text


def test_votes_that_cannot_count_are_told_why(client):
    refused = client.post("/v1/votes", json={"battle": "0" * 24, "verdict": "a"})
    assert refused.status_code == 404 and "does not exist" in refused.text
    battle = client.post("/v1/battles", json={}).json()
    refused = client.post("/v1/votes", json={"battle": battle["id"], "verdict": "a"})
    assert refused.status_code == 409 and "has not been streamed to its end" in refused.text


def test_an_answer_that_broke_off_is_not_kept(client):
    battle = client.post("/v1/battles", json={}).json()
    for side, prompt in (("a", "hi"), ("b", "fail")):
        asked = ASKED | {"model": battle[side], "messages": [{"role": "user", "content": prompt}]}
        client.post("/v1/chat/completions", json=asked)
    refused = client.post("/v1/votes", json={"battle": battle["id"], "verdict": "a"})
    assert refused.status_code == 409 and "Answer b has not" in refused.text


def test_recording_changes_no_byte_however_the_stream_is_cut(votes):
    """Cut into pieces of every length from 1 to 40 characters; the answer is kept before its last piece goes out."""

    async def passed_on(alias: str, width: int) -> tuple[str, str]:
        whole = "".join([event async for event in says("héllo\nwörld and\u2028more")])

        async def cut() -> AsyncIterator[str]:
            for start in range(0, len(whole), width):
                yield whole[start : start + width]

        body = ChatBody.model_validate({"model": alias, "messages": [{"role": "user", "content": "hi"}], "seed": 1})
        return whole, "".join([piece async for piece in recorded(cut(), votes, alias, body, "digest")])

    for width in range(1, 41):
        battle = votes.start("sft", "iter-0")
        for alias in (battle.a, battle.b):
            whole, passed = asyncio.run(passed_on(alias, width))
            assert passed == whole
        votes.vote(battle.id, "a")
    assert {pair["chosen"][-1]["content"] for pair in votes.export()} == {"héllo\nwörld and\u2028more"}


def test_a_database_that_does_not_answer_is_503_and_streams_go_on(client, votes, tmp_path):
    battle = client.post("/v1/battles", json={}).json()
    votes.close()
    (tmp_path / "votes.sqlite").write_bytes(b"no database any more" * 1000)
    assert "[DONE]" in client.post("/v1/chat/completions", json=ASKED | {"model": battle["a"]}).text
    for method, path, body in (
        ("POST", "/v1/battles", {}),
        ("POST", "/v1/votes", {"battle": battle["id"], "verdict": "a"}),
        ("GET", "/v1/leaderboard", None),
        ("GET", "/v1/votes/export", None),
    ):
        answer = client.request(method, path, json=body)
        assert (answer.status_code, answer.headers.get("retry-after")) == (503, "5"), path


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
                    vote = {"battle": battle["id"], "verdict": "a"}
                    if client.post("/v1/votes", json=vote).status_code == 200:
                        acknowledged.add(battle["id"])
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
