"""A run on Google Cloud Storage (its XML API, faked on loopback) is the run on a local disk, through the same code."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.fence import LEASE
from spin_ray.run_dir.lease import Lease
from spin_ray.run_dir.object_storage import ObjectStorage
from tests.faults.test_object_storage import committed_on, objects
from tests.support import small_run
from tests.support.fake_gcs import FakeGcs
from tests.support.small_run import committed


@pytest.fixture(scope="module")
def server() -> Iterator[FakeGcs]:
    server = FakeGcs()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def uri(server: FakeGcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Of a run; the endpoint is in the service account's file, where a private one is named."""
    account = {"gcs_base_url": f"http://127.0.0.1:{server.server_address[1]}", "disable_oauth": True}
    account |= {"client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"):  # pyarrow's is set from obstore's
        monkeypatch.setenv(name, str(tmp_path / "account.json"))
    monkeypatch.setattr(object_storage, "CACHE", tmp_path / "cache")
    return f"gs://bucket/{tmp_path.name}"


def test_a_run_on_gcs_is_the_local_run_byte_for_byte(uri: str, config: SpinConfig, calm: Path) -> None:
    small_run.run(config, uri)
    assert committed_on(uri, calm) == committed(calm)
    assert objects(uri)["LATEST"] == (calm / "LATEST").read_bytes()
    assert LEASE not in objects(uri)
    before = objects(uri)
    small_run.run(config, uri)
    assert objects(uri).keys() == before.keys() and objects(uri)["events.jsonl"] == before["events.jsonl"]


def test_one_of_many_creates_one_of_many_drivers_and_one_of_many_exchanges_wins(uri: str) -> None:
    ObjectStorage(uri).replace("turn", b"old")

    def create(number: int) -> bool:
        try:
            ObjectStorage(uri).create("file", str(number).encode())
        except FileExistsError:
            return False
        return True

    given_back = ExitStack()  # a lease that is kept has a thread that goes on when the server has ended

    def take(_: int) -> bool:
        try:
            given_back.enter_context(Lease(ObjectStorage(uri), timeout_s=60))
        except RunDirError:
            return False
        return True

    def exchange(number: int) -> bool:
        return ObjectStorage(uri).swap("turn", b"old", str(number).encode())

    with given_back, ThreadPoolExecutor(6) as pool:
        for attempt in (create, take, exchange):
            assert sum(pool.map(attempt, range(6))) == 1, attempt.__name__


def test_a_large_file_goes_in_parts_and_comes_back_whole(uri: str, server: FakeGcs) -> None:
    """Parts of 5 MiB: 12 MiB are three."""
    storage, data = ObjectStorage(uri), bytes(range(256)) * 2**12 * 12
    attempt = storage.new_attempt_folder()
    (attempt / "weights").write_bytes(data)
    (attempt / "_MANIFEST.json").write_bytes(b"{}")
    before = server.parts_received
    storage.create_folder("iter_000/model", attempt)
    assert server.parts_received - before == 3
    assert storage.read("iter_000/model/weights") == data and not server.uploads
    files = {"weights": storage.digest("iter_000/model/weights")}
    assert (storage.local_folder("iter_000/model", files) / "weights").read_bytes() == data
