"""Comparisons and votes in a database: once each, of what the server saw, and there after a crash."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from sqlalchemy import make_url
from sqlalchemy.schema import CreateTable

from spin_ray.config.sections import DataConfig
from spin_ray.errors import UserError
from spin_ray.inputs.conversations import conversations_of, read_row
from spin_ray.inputs.sources import read_slice, split
from spin_ray.run_dir.object_storage import ObjectStorage
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.serving.app import votes_url
from spin_ray.serving.arena.battles import BATTLE_TTL_S, Answer, Battle, Question, Tally
from spin_ray.serving.arena.votes import VoteStore, _battles, _by_time, _by_vote, _creation
from spin_ray.serving.errors import Refusal
from tests.support.fakes import config_of

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how are you?"}]


@pytest.fixture
def clock():
    class Clock:
        now = 1_000_000.0

        def __call__(self) -> float:
            return self.now

    return Clock()


@pytest.fixture
def votes(tmp_path, clock):
    store = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite", clock)
    yield store
    store.close()


def started(votes: VoteStore, a: str = "sft", b: str = "iter-0") -> Battle:
    return votes.start(a, b, Question(QUESTION, {"seed": 7}))


def answered(votes: VoteStore, a: str = "sft", b: str = "iter-0") -> Battle:
    battle = started(votes, a, b)
    votes.record(battle.id, "a", Answer(f"{a} says", "stop", f"{a}-digest"))
    votes.record(battle.id, "b", Answer(f"{b} says", "stop", f"{b}-digest"))
    return battle


def test_a_vote_names_the_sides_and_their_checkpoints(votes):
    battle = answered(votes)
    vote = votes.vote(battle.id, "b")
    assert (vote.model_a, vote.digest_a, vote.model_b, vote.digest_b) == (
        "sft",
        "sft-digest",
        "iter-0",
        "iter-0-digest",
    )
    assert votes.tallies() == [Tally(("sft", "sft-digest"), ("iter-0", "iter-0-digest"), "b", 1)]


def test_the_same_vote_again_is_the_same_vote_and_another_is_refused(votes):
    battle = answered(votes)
    assert votes.vote(battle.id, "a") == votes.vote(battle.id, "a")
    with pytest.raises(Refusal, match="voted on before") as refused:
        votes.vote(battle.id, "tie")
    assert refused.value.status == 409
    assert [tally.count for tally in votes.tallies()] == [1]


def test_of_many_votes_at_once_one_counts(votes):
    battle = answered(votes)
    together = threading.Barrier(8)

    def vote(verdict: str) -> str:
        together.wait()
        try:
            return votes.vote(battle.id, verdict).verdict
        except Refusal as refusal:
            return f"refused with {refusal.status}"  # not with 503: writers wait for each other

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(vote, ["a", "b"] * 4))
    assert sorted(set(results)) in (["a", "refused with 409"], ["b", "refused with 409"])
    assert [tally.count for tally in votes.tallies()] == [1]


@pytest.mark.parametrize("missing", ["a", "b"])
def test_a_vote_needs_both_answers(votes, missing):
    battle = started(votes)
    votes.record(battle.id, "b" if missing == "a" else "a", Answer("hi", "stop", "d"))
    with pytest.raises(Refusal, match=f"Answer {missing} has not") as refused:
        votes.vote(battle.id, "tie")
    assert refused.value.status == 409


def test_the_first_whole_answer_of_a_side_counts(votes):
    """Asking until a better answer comes must not help a side."""
    battle = answered(votes)
    votes.record(battle.id, "a", Answer("a better one", "stop", "d"))
    votes.vote(battle.id, "a")
    votes.record(battle.id, "a", Answer("after the vote", "stop", "d"))
    assert next(votes.export())["chosen"] == [*QUESTION, {"role": "assistant", "content": "sft says"}]


def test_unknown_and_old_comparisons_are_refused(votes, clock):
    with pytest.raises(Refusal) as refused:
        votes.vote("0" * 24, "a")
    assert refused.value.status == 404
    battle = answered(votes)
    clock.now += BATTLE_TTL_S + 1
    with pytest.raises(Refusal, match="too old") as refused:
        votes.vote(battle.id, "a")
    assert refused.value.status == 410


def test_comparisons_without_a_vote_are_forgotten_and_votes_are_not(votes, clock):
    kept, dropped = answered(votes), answered(votes)
    votes.vote(kept.id, "a")
    clock.now += BATTLE_TTL_S + 1
    started(votes)
    assert votes.vote(kept.id, "a").verdict == "a"
    with pytest.raises(Refusal, match="does not exist"):
        votes.vote(dropped.id, "a")


def test_export_pairs_what_was_preferred_with_what_was_not(votes, clock, monkeypatch):
    """More votes than the export reads at a time, many of them at the same moment; ties make no pair."""
    monkeypatch.setattr("spin_ray.serving.arena.votes.EXPORT_ROWS", 8)
    verdicts = (["a"] * 3 + ["b", "tie", "both_bad"]) * 6
    battles = [answered(votes) for _ in verdicts]
    for number, (battle, verdict) in enumerate(zip(battles, verdicts, strict=True)):
        clock.now += number % 7 == 0
        votes.vote(battle.id, verdict)
    pairs = list(votes.export())
    assert len({pair["battle"] for pair in pairs}) == len(pairs) == 24
    assert [pair["voted"] for pair in pairs] == sorted(pair["voted"] for pair in pairs)
    assert {(pair["chosen_model"], pair["rejected_digest"]) for pair in pairs} == {
        ("sft", "iter-0-digest"), ("iter-0", "sft-digest"),
    }  # fmt: skip
    first = next(pair for pair in pairs if pair["chosen_model"] == "sft")
    assert first["chosen"] == [*QUESTION, {"role": "assistant", "content": "sft says"}]
    assert first["rejected"] == [*QUESTION, {"role": "assistant", "content": "iter-0 says"}]
    assert first["sampling"] == {"seed": 7} and first["chosen_finish_reason"] == "stop"


def test_exported_pairs_are_data_for_this_package(votes, tmp_path):
    votes.vote(answered(votes).id, "b")
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in votes.export()))
    (row,) = [row for piece in split([str(file)]) for row in read_slice(piece)]
    data = DataConfig(train=str(file))
    assert conversations_of(row.content, data) == [[*QUESTION, {"role": "assistant", "content": "iter-0 says"}]]
    assert read_row(row.content, data).rejected == [*QUESTION, {"role": "assistant", "content": "sft says"}]


def test_text_that_no_database_column_takes_survives(votes):
    """A lone surrogate and NUL, as JSON allows them in a request and a byte-level model in an answer."""
    battle = votes.start("sft", "iter-0", Question([{"role": "user", "content": "\udfff\0"}], {"seed": 7}))
    for side in ("a", "b"):
        votes.record(battle.id, side, Answer("\ud800 and \0", "stop", "d"))
    votes.vote(battle.id, "a")
    (pair,) = votes.export()
    assert [message["content"] for message in pair["chosen"]] == ["\udfff\0", "\ud800 and \0"]


@pytest.mark.parametrize("name", ["mysql+pymysql", "mariadb+pymysql", "postgresql+psycopg", "sqlite"])
def test_every_kind_of_database_keeps_microseconds_and_understands_its_tables(name):
    """Compiled, not run: MySQL's ``FLOAT`` rounds times to 128 s, and its ``CREATE INDEX`` has no ``IF NOT EXISTS``."""
    dialect = make_url(f"{name}://").get_dialect()()
    table = str(CreateTable(_battles).compile(dialect=dialect))
    assert re.findall(r"(?:created|voted) (DOUBLE|FLOAT)", table) == ["DOUBLE", "DOUBLE"]
    for index in (_by_time, _by_vote):
        told = str(_creation(index, dialect).compile(dialect=dialect))
        assert ("IF NOT EXISTS" in told) == (not name.startswith("mysql"))


def test_two_stores_share_a_file(votes, tmp_path, clock):
    other = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite", clock)
    battle = answered(votes)
    assert other.vote(battle.id, "a") == votes.vote(battle.id, "a")
    other.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("votes.sqlite", "not a database URL"),
        ("nosuch://x/y", "not a database URL"),
        ("sqlite:////no/such/folder/v", "unable to open"),
    ],
)
def test_a_database_that_cannot_be_used_is_an_error_for_the_user(url, says):
    with pytest.raises(UserError, match=says):
        VoteStore(url)


def test_votes_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Also the write-ahead log beside the file, and a file that was there before and open to others."""
    file = tmp_path / "votes.sqlite"
    file.touch(0o644)
    store = VoteStore(f"sqlite:///{file}")
    started(store)
    assert {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {
        f"votes.sqlite{end}": 0o600 for end in ("", "-wal", "-shm")
    }
    store.close()


def test_the_command_writes_a_runs_votes_in_the_form_of_another_trainer(call, tmp_path):
    run = RunDir(Storage(tmp_path / "run"))
    run.begin(config_of(), {"inputs": {}, "start_model": "m", "versions": {}})
    to = ("--what", "votes", "--form", "sharegpt", "--to", tmp_path / "votes.jsonl")
    code, _, error = call("export", run.storage.root, *to)
    file = run.storage.path("votes.sqlite")
    assert (code, error) == (
        2,
        f"error: {file}: there are no votes; spin-ray serve collects them at /, on its own machine or in the database "
        "of its --serving.votes; give that option here, too\n",
    )
    assert not file.exists()
    store = VoteStore(f"sqlite:///{file}")
    store.vote(answered(store).id, "a")
    store.close()
    code, _, error = call("export", run.storage.root, *to)
    assert (code, error) == (0, f"votes of sqlite:///{file}\n1 rows written\n")
    [row] = map(json.loads, (tmp_path / "votes.jsonl").read_text().splitlines())
    assert row["chosen"] == {"from": "gpt", "value": "sft says"}


def test_votes_of_a_run_in_a_store_are_read_where_its_server_keeps_them(call, tmp_path, monkeypatch):
    """In this machine's cache, or in the database that the server was given on its command line."""
    monkeypatch.setenv("SPIN_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(ObjectStorage, "_store", MemoryStore())
    run = RunDir(ObjectStorage("s3://bucket/run"))
    run.begin(config_of(), {"inputs": {}, "start_model": "m", "versions": {}})
    given = f"sqlite:///{tmp_path}/given.sqlite"
    for url, verdict in ((votes_url("s3://bucket/run", config_of()), "a"), (given, "b")):
        store = VoteStore(url)
        store.vote(answered(store).id, verdict)
        store.close()
    says = []
    for number, options in enumerate(((), ("--serving.votes", given))):
        file = tmp_path / f"{number}.jsonl"
        code, _, error = call("export", "s3://bucket/run", "--what", "votes", "--to", file, *options)
        assert code == 0, error
        [row] = map(json.loads, file.read_text().splitlines())
        says.append(row["chosen"][-1]["content"])
    assert says == ["sft says", "iter-0 says"]
    code, _, error = call("export", "s3://bucket/run", "--to", tmp_path / "model", "--serving.votes", given)
    assert (code, error) == (2, "error: --serving.votes: is for --what votes, not model\n")
