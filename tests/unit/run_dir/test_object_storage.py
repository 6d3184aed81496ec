"""A store that cannot be used is told at once; one that has answered before is waited for."""

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError
from obstore.store import MemoryStore

from spin_ray.errors import ConfigError, StageError
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.object_storage import ObjectStorage, open_storage
from spin_ray.run_dir.storage import Storage

NO_ROLE = GenericError("Error performing PUT http://169.254.169.254/latest/api/token: 403 Forbidden")


def fail(error: BaseError) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "DEADLINE_S", 0.4)
    monkeypatch.setattr(object_storage, "FIRST_DEADLINE_S", 0.1)


@pytest.mark.parametrize(
    ("error", "said"),
    [(NO_ROLE, "no credentials were found"), (PermissionDeniedError("403"), "refuses the credentials")],
)
def test_a_store_without_access_is_a_mistake_until_it_has_answered(error: BaseError, said: str) -> None:
    storage = ObjectStorage("s3://bucket/run")
    with pytest.raises(ConfigError, match=f"s3://bucket/run: {said}; give AWS_ACCESS_KEY_ID"):
        storage._insist("lease.json", fail(error))
    storage._insist("lease.json", lambda: None)
    with pytest.raises(StageError, match=r"the store failed for \d s, \d times"):
        storage._insist("lease.json", fail(error))


@pytest.mark.slow
def test_a_call_that_took_longer_than_the_deadline_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the upload of a large file over a slow link: each try takes longer than the store is waited for."""
    monkeypatch.setattr(object_storage, "DEADLINE_S", 0.05)
    storage, tries = ObjectStorage("s3://bucket/run", has_answered=True), list[int]()

    def upload() -> str:
        time.sleep(0.1)
        tries.append(len(tries))
        if len(tries) < 4:
            raise GenericError("503 Slow Down")
        return "arrived"

    assert storage._insist("model", upload) == "arrived"
    tries.clear()
    with pytest.raises(StageError, match=r"run/model: the store failed for [1-9] s, 4 times \(503 Slow Down\)"):
        storage._insist("model", lambda: (time.sleep(0.3), tries.append(0), fail(GenericError("503 Slow Down"))()))
    assert len(tries) == 4


def test_a_store_that_has_never_answered_is_given_up_soon_with_the_reason(monkeypatch, caplog) -> None:
    """Port 9 refuses. A later request is waited for as long as the machine of a store may take to start again."""
    monkeypatch.setattr(object_storage, "FIRST_ANSWER_S", 0.3)
    monkeypatch.setattr(object_storage, "DEADLINE_S", 60)
    caplog.set_level("INFO")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StageError,
        match=r"at AWS_ENDPOINT_URL http://127.0.0.1:9 has not .* \d times \(Connection refused\); is it run",
    ) as caught:
        ObjectStorage("s3://bucket/run").exists("run.json")
    assert "committed" not in str(caught.value)
    assert "tried again in 0.1 s (Connection refused)" in caplog.text
    monkeypatch.setattr(object_storage, "DEADLINE_S", 0.4)
    known = ObjectStorage("s3://bucket/run", has_answered=True)
    for storage in (known.fenced("token"), pickle.loads(pickle.dumps(known))):  # noqa: S301 (our own)
        with pytest.raises(StageError, match=r"the store failed for .*\(Connection refused\).*committed is kept"):
            storage.exists("run.json")


def test_a_scheme_of_no_store_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="ftp:// is no store that can hold a run"):
        open_storage("ftp://host/run")
    assert isinstance(open_storage("gs://bucket/run"), ObjectStorage)


def opened_on(store: MemoryStore) -> ObjectStorage:
    storage = ObjectStorage("s3://bucket/run")
    storage.__dict__["_store"] = store  # in the place of the one that _store opens
    return storage


def test_the_entries_of_a_folder_are_named_as_on_a_file_system(tmp_path: Path) -> None:
    store, storage = opened_on(MemoryStore()), Storage(tmp_path)
    for name in ("run.json", "iter_000/checkpoints/abc/checkpoint_1/spin_ray-0.json", "iter_000/train_log.jsonl"):
        for each in (store, storage):
            each.create(name, b"{}")
    for folder in ("iter_000", "iter_000/checkpoints/abc", "iter_001"):
        assert store.entries(folder) == storage.entries(folder)
    assert store.entries() == ["iter_000", "run.json"]
    assert store.entries("iter_000") == ["checkpoints", "train_log.jsonl"]


def test_a_line_that_another_process_appends_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``judge`` beside the driver. The other's line arrives between this append's read and its put."""
    storage, get, others = opened_on(MemoryStore()), obstore.get, iter(["of the driver\n"])
    storage.append("events.jsonl", "old\n")

    def overtaken(store: Any, name: str) -> Any:
        found = get(store, name)
        for line in others:
            opened_on(store).append(name, line)
        return found

    monkeypatch.setattr(obstore, "get", overtaken)
    storage.append("events.jsonl", "of the judge\n")
    assert storage.read("events.jsonl") == b"old\nof the driver\nof the judge\n"


def test_an_update_is_made_again_of_what_another_process_put_meanwhile() -> None:
    storage, others = opened_on(MemoryStore()), iter([b"theirs "])

    def with_mine(content: bytes | None) -> bytes:
        for other in others:
            storage.replace("eval.json", other)
        return (content or b"") + b"mine"

    storage.update("eval.json", with_mine)
    assert storage.read("eval.json") == b"theirs mine"


def test_a_line_whose_reply_was_lost_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process appends before the put is tried again."""
    storage, put, others = opened_on(MemoryStore()), obstore.put, iter(["another's\n"])

    def lose_reply(store: Any, name: str, data: bytes, **mode: Any) -> None:
        put(store, name, data, **mode)
        for line in others:
            storage.append(name, line)
            raise GenericError("connection reset")

    monkeypatch.setattr(object_storage, "DEADLINE_S", 60)
    monkeypatch.setattr(obstore, "put", lose_reply)
    storage.append("events.jsonl", "mine\n")
    storage.append("events.jsonl", "mine too\n")
    assert storage.read("events.jsonl") == b"mine\nanother's\nmine too\n"
