"""A votes' database that is locked or slow, and its end with the server's."""

import asyncio
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from spin_ray.errors import UserError
from spin_ray.serving import app
from spin_ray.serving.arena import threads, votes
from spin_ray.serving.arena.votes import VoteStore
from tests.serving.test_arena_api import ASKED
from tests.support.arena_app import make
from tests.support.tiny_runs import tiny_config


def client_of(store: VoteStore) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(make(store, max_concurrent=200)), base_url="http://localhost"
    )


@pytest.mark.slow
def test_a_locked_database_holds_up_nothing_but_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 comparisons wait for the lock, more than the event loop has threads; the page opens before any ends."""
    monkeypatch.setattr(votes, "_LOCKED_MS", 60_000)
    monkeypatch.setattr(threads, "WAIT_S", 60)
    store = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite")

    async def ask_all() -> None:
        async with client_of(store) as client:
            with sqlite3.connect(tmp_path / "votes.sqlite", isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")
                asked = [asyncio.create_task(client.post("/v1/battles", json=ASKED)) for _ in range(60)]
                await asyncio.sleep(0.2)
                for path in ("/", "/arena.js", "/v1/arena"):
                    assert (await asyncio.wait_for(client.get(path), 20)).status_code == 200
                assert not any(task.done() for task in asked)
                other.execute("ROLLBACK")
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}

    asyncio.run(ask_all())
    store.close()


@pytest.mark.slow
def test_comparisons_that_wait_for_a_locked_database_are_refused_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with a thread by SQLite's limit, the others by the server's; one after another, 60 would wait 7.5 s."""
    monkeypatch.setattr(votes, "_LOCKED_MS", 500)
    store = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite")

    async def ask_all() -> None:
        async with client_of(store) as client:
            with sqlite3.connect(tmp_path / "votes.sqlite", isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")
                began = time.monotonic()
                answers = await asyncio.gather(*(client.post("/v1/battles", json=ASKED) for _ in range(60)))
                assert time.monotonic() - began < threads.WAIT_S + 3
                other.execute("ROLLBACK")
            assert {answer.status_code for answer in answers} == {503}
            assert all(int(answer.headers["retry-after"]) >= 5 for answer in answers)
            assert any("database is locked" in answer.text for answer in answers)

    asyncio.run(ask_all())
    store.close()


def test_a_lock_is_waited_for_from_the_first_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is not in WAL mode yet, under another program's exclusive lock."""
    monkeypatch.setattr(votes, "_LOCKED_MS", 300)
    with sqlite3.connect(tmp_path / "votes.sqlite", isolation_level=None) as other:
        other.execute("CREATE TABLE something (x)")
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(UserError, match="database is locked"):
            VoteStore(f"sqlite:///{tmp_path}/votes.sqlite")
        assert 0.25 < time.monotonic() - began < 5


def test_the_page_is_served_with_its_types_and_marks(tmp_path: Path) -> None:
    store = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite")

    async def look() -> None:
        async with client_of(store) as client:
            for path, kind in (
                ("/", "text/html"), ("/arena.css", "text/css"), ("/api.js", "text/javascript"),
                ("/arena.svg", "image/svg+xml"),
            ):  # fmt: skip
                answer = await client.get(path)
                assert answer.headers["content-type"].startswith(kind) and answer.headers["etag"]
                assert answer.headers["cache-control"] == "no-store"

    asyncio.run(look())
    store.close()


def test_the_database_is_closed_when_the_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[str] = []

    async def follow() -> None:
        followed.append("begun")
        try:
            await asyncio.sleep(60)
        finally:
            followed.append("ended")

    closed: list[VoteStore] = []
    close = VoteStore.close
    monkeypatch.setattr(VoteStore, "close", lambda store: (closed.append(store), close(store)))
    monkeypatch.setattr(app, "ServeEngines", lambda keeper, sees_all: SimpleNamespace(follow=follow))
    monkeypatch.setattr(app, "open_run", lambda folder: None)

    async def live() -> None:
        served = app.endpoint(str(tmp_path), tiny_config(), None)
        async with served.router.lifespan_context(served):
            await asyncio.sleep(0)
            assert followed == ["begun"] and closed == []

    asyncio.run(live())
    assert followed == ["begun", "ended"] and len(closed) == 1
