"""A run on S3 (moto's server on loopback, behind a proxy that fails as networks do) is the run on a local disk."""

import hashlib
import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest

from spin_ray.config.sections import SpinConfig
from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.fence import LEASE
from spin_ray.run_dir.lease import Lease
from spin_ray.run_dir.object_storage import ObjectStorage, open_storage
from spin_ray.run_dir.storage import MANIFEST
from tests.support import small_run
from tests.support.small_run import committed

FAILURES = ("500", "503", "slow", "reply lost", "refused")


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the store; ``plan`` says what goes wrong with each."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.plan: Callable[[str, str], str] = lambda method, path: ""
        self.injected: Counter[str] = Counter()


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        failure = self.server.plan(self.command, self.path)
        self.server.injected[failure] += 1
        if failure == "refused":
            self.close_connection = True
            return
        if failure in ("500", "503"):
            self._answer(int(failure), {}, b"")
            return
        if failure == "slow":
            threading.Event().wait(0.3)
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))
        reply = upstream.getresponse()
        content = reply.read()
        if failure == "reply lost":
            self.close_connection = True
            return
        length = reply.headers.get("content-length") if self.command == "HEAD" else None
        headers = {key: value for key, value in reply.headers.items() if key.lower() not in ("connection", "date")}
        self._answer(reply.status, headers, content, length)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(key, value)
        self.send_header("content-length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815 (names that http.server wants)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy((host, port))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    yield proxy
    proxy.shutdown()
    server.stop()


@pytest.fixture(autouse=True)
def store(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    environment = {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1", "ENDPOINT_URL": endpoint}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(object_storage, "CACHE", tmp_path / "cache")
    proxy.injected.clear()
    yield
    proxy.plan = lambda method, path: ""


def uri_of(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


def objects(uri: str) -> dict[str, bytes]:
    storage = ObjectStorage(uri)
    return {one["path"]: storage.read(one["path"]) for one in obstore.list(storage._store).collect()}


def committed_on(uri: str, calm: Path) -> dict[str, str]:
    found = {name: hashlib.sha256(data).hexdigest() for name, data in objects(uri).items()}
    return {name: found[name] for name in committed(calm) if name in found}


def test_a_run_on_s3_is_the_local_run_byte_for_byte(tmp_path: Path, config: SpinConfig, calm: Path) -> None:
    small_run.run(config, uri_of(tmp_path))
    assert committed_on(uri_of(tmp_path), calm) == committed(calm)
    found = objects(uri_of(tmp_path))
    assert found["LATEST"] == (calm / "LATEST").read_bytes()
    assert {name for name in found if name.endswith(MANIFEST)} == {
        str(path.relative_to(calm)) for path in calm.rglob(MANIFEST)
    }
    assert LEASE not in found and not [name for name in found if name.startswith(".attempts")]


def test_a_run_on_a_store_that_keeps_failing_is_the_same(
    tmp_path: Path, config: SpinConfig, calm: Path, proxy: Proxy
) -> None:
    """One request in eight goes wrong, in each of five ways."""
    chance = random.Random(7)
    proxy.plan = lambda method, path: chance.choice(FAILURES) if chance.random() < 0.125 else ""
    small_run.run(config, uri_of(tmp_path))
    assert set(FAILURES) <= set(proxy.injected)
    proxy.plan = lambda method, path: ""
    assert committed_on(uri_of(tmp_path), calm) == committed(calm)


def test_a_store_that_is_gone_is_an_error_that_names_it_and_the_run_goes_on_later(
    tmp_path: Path, config: SpinConfig, calm: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "DEADLINE_S", 0.5)
    proxy.plan = lambda method, path: "503" if "pairs" in path else ""
    with pytest.raises(StageError, match=rf"{uri_of(tmp_path)}/iter_000/pairs.*: the store failed for 0 s .*run the"):
        small_run.run(config, uri_of(tmp_path))
    proxy.plan = lambda method, path: ""
    small_run.run(config, uri_of(tmp_path))
    assert committed_on(uri_of(tmp_path), calm) == committed(calm)


def test_a_create_whose_reply_was_lost_has_happened_once(tmp_path: Path, proxy: Proxy) -> None:
    storage, lost = ObjectStorage(uri_of(tmp_path)), []

    def lose_first(method: str, path: str) -> str:
        if method == "PUT" and not lost:
            lost.append(path)
            return "reply lost"
        return ""

    proxy.plan = lose_first
    storage.create("file", b"mine")
    assert lost and storage.read("file") == b"mine"
    with pytest.raises(FileExistsError):
        storage.create("file", b"another's")
    assert storage.read("file") == b"mine"


def test_of_many_writers_and_drivers_at_once_exactly_one_wins(tmp_path: Path) -> None:
    def create(number: int) -> bool:
        try:
            ObjectStorage(uri_of(tmp_path)).create("file", str(number).encode())
        except FileExistsError:
            return False
        return True

    def take(_: int) -> bool:
        try:
            Lease(ObjectStorage(uri_of(tmp_path)), timeout_s=60).__enter__()
        except RunDirError as error:
            assert "in use by process" in str(error)  # noqa: PT017
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(create, range(6))) == 1
        assert sum(pool.map(take, range(6))) == 1


def test_a_driver_that_was_taken_over_commits_nothing_more(tmp_path: Path) -> None:
    storage = ObjectStorage(uri_of(tmp_path))
    with Lease(storage, timeout_s=60) as lease:
        lease.storage.append("events.jsonl", "still allowed\n")
        storage.replace(LEASE, b'{"token": "t", "host": "node-7", "pid": 1, "boot": "b", "started": 1, "renewed": 1}')
        before = objects(uri_of(tmp_path))
        for change in (
            lambda: lease.storage.create(f"iter_000/pairs/{MANIFEST}", b"mine"),
            lambda: lease.storage.replace("LATEST", b"mine"),
            lambda: lease.storage.append("events.jsonl", "mine\n"),
            lambda: lease.storage.delete("events.jsonl"),
        ):
            with pytest.raises(RunDirError, match="taken over by process 1 on node-7"):
                change()
    assert objects(uri_of(tmp_path)) == before


def test_a_model_is_fetched_once_per_machine_and_a_damaged_one_is_refused(tmp_path: Path, proxy: Proxy) -> None:
    storage = ObjectStorage(uri_of(tmp_path))
    attempt = storage.new_attempt_folder()
    (attempt / "weights").write_bytes(b"1234")
    (attempt / MANIFEST).write_bytes(b"{}")
    storage.create_folder("iter_000/model", attempt)
    files = {"weights": storage.digest("iter_000/model/weights")}
    folder = storage.local_folder("iter_000/model", files)
    asked = proxy.injected.total()
    assert storage.local_folder("iter_000/model", files) == folder and (folder / "weights").read_bytes() == b"1234"
    assert proxy.injected.total() == asked
    storage.replace("iter_000/model/weights", b"1235")
    (folder / "weights").unlink()
    folder.rmdir()
    with pytest.raises(RunDirError, match=r"iter_000/model/weights: differs from its digest"):
        storage.local_folder("iter_000/model", files)


def test_where_a_run_is_kept_follows_from_how_it_is_written(tmp_path: Path) -> None:
    assert isinstance(open_storage("s3://bucket/run"), ObjectStorage)
    for local in (tmp_path, f"file://{tmp_path}", "runs/x"):
        assert not isinstance(open_storage(local), ObjectStorage)


def test_a_large_file_goes_in_parts_that_can_fail_alone(tmp_path: Path, proxy: Proxy) -> None:
    """Parts of 5 MiB: 12 MiB are three. The first time the second is refused, and the upload starts over."""
    storage, data = ObjectStorage(uri_of(tmp_path)), bytes(range(256)) * 2**12 * 12
    attempt = storage.new_attempt_folder()
    (attempt / "weights").write_bytes(data)
    (attempt / MANIFEST).write_bytes(b"{}")
    parts: list[str] = []

    def refuse_one(method: str, path: str) -> str:
        if method == "PUT" and "partNumber=" in path:
            parts.append(path.partition("partNumber=")[2].partition("&")[0])
            return "503" if parts[-1] == "2" and parts.count("2") == 1 else ""
        return ""

    proxy.plan = refuse_one
    storage.create_folder("iter_000/model", attempt)
    assert set(parts) == {"1", "2", "3"} and parts.count("2") == 2
    assert storage.read("iter_000/model/weights") == data


def test_a_model_is_fetched_once_though_all_processes_of_a_machine_ask_at_once(tmp_path: Path, proxy: Proxy) -> None:
    storage = ObjectStorage(uri_of(tmp_path))
    storage.replace("iter_000/model/weights", b"1234")
    files = {"weights": storage.digest("iter_000/model/weights")}
    asked = proxy.injected.total()
    proxy.plan = lambda method, path: "slow"
    with ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda _: ObjectStorage(uri_of(tmp_path)).local_folder("iter_000/model", files), range(6))
        )
    assert len(set(found)) == 1 and (found[0] / "weights").read_bytes() == b"1234"
    assert proxy.injected.total() - asked == 1
