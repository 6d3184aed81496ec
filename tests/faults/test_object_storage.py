"""A run on S3 (moto's server on loopback, behind a proxy that fails as networks do) is the run on a local disk."""

import hashlib
import http.client
import json
import pickle
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError, StageError
from spin_ray.inputs.model_folder import open_model
from spin_ray.report import benchmarks
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.fence import LEASE
from spin_ray.run_dir.lease import Lease
from spin_ray.run_dir.object_storage import ObjectStorage, open_storage
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import MANIFEST, bytes_digest
from spin_ray.serving.iterates import open_iterate
from tests.support import small_run
from tests.support.small_run import committed

Call = Callable[..., tuple[int, str, str]]
FAILURES = ("500", "503", "slow", "reply lost", "refused")
CUT_AT = 9 * 2**20


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
    disable_nagle_algorithm = True  # a body would wait 40 ms for the client to acknowledge the head

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
        if failure == "cut" and len(content) > CUT_AT:
            length, content = str(len(content)), content[:CUT_AT]
            self.close_connection = True
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
    with pytest.raises(StageError, match=rf"{uri_of(tmp_path)}/iter_000/pairs.*: the store failed for \d s, .*run the"):
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

    def take(lease: Lease) -> bool:
        try:
            held.enter_context(lease)
        except RunDirError as error:
            assert "in use by process" in str(error)  # noqa: PT017
            return False
        return True

    with ExitStack() as held, ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(create, range(6))) == 1
        leases = [Lease(ObjectStorage(uri_of(tmp_path)), timeout_s=60) for _ in range(6)]
        assert sum(pool.map(take, leases)) == 1


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


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a link on which no request brings the whole object: of 20 MiB each brings 9, of which 8 count."""
    storage, data = ObjectStorage(uri_of(tmp_path)), bytes(range(256)) * 2**12 * 20
    storage.replace("iter_000/model/weights", data)
    monkeypatch.setattr(object_storage, "DEADLINE_S", 0.5)
    proxy.plan = lambda method, path: "cut"
    files = {"weights": storage.digest("iter_000/model/weights")}
    assert files["weights"] == bytes_digest(data)
    assert (storage.local_folder("iter_000/model", files) / "weights").read_bytes() == data
    assert proxy.injected["cut"] == 2 * 3


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


# Every command


@pytest.fixture
def stored(tmp_path: Path, calm: Path) -> str:
    """The URI of a copy of the run that nothing disturbed."""
    storage = ObjectStorage(uri_of(tmp_path))
    for path in calm.rglob("*"):
        if path.is_file() and ".attempts" not in path.parts:
            storage.replace(path.relative_to(calm).as_posix(), path.read_bytes())
    return uri_of(tmp_path)


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A judge that finds every first reply better."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps({"choices": [{"message": {"content": "[[A]]"}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def test_a_bucket_that_is_not_there_is_told_by_every_command(call: Call, tmp_path: Path, config: SpinConfig) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(config.model_dump(mode="json")))
    uri = f"s3://nosuchbucket/{tmp_path.name}"
    for words in (("doctor", recipe, "--no-cluster", "--out", uri), ("status", uri), ("run", recipe, "--out", uri)):
        code, _, error = call(*words)
        assert code == 2 and "the store has no such bucket; make it, or" in error, (words, error)
    code, out, error = call("doctor", recipe, "--no-cluster", "--out", uri_of(tmp_path))
    assert (code, error) == (0, "") and f"a store answers: {uri_of(tmp_path)} (writing not tried)" in out


def test_every_command_that_reads_a_run_reads_one_on_a_store(
    stored: str, calm: Path, tmp_path: Path, call: Call, endpoint: str
) -> None:
    def done(*words: object) -> str:
        code, out, error = call(*words)
        assert code == 0, error
        return out

    assert "LATEST: iter_000" in done("status", stored)
    assert json.loads(done("status", stored, "--json"))["evaluations"][1]["iterate"] == "iter_000"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert done("report", stored).strip() == f"{stored}/report.html"
    assert b"iter_000" in objects(stored)["report.html"]
    done("export", stored, "--to", tmp_path / "exported")
    weights = (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert weights == (calm / "iter_000/model/model.safetensors").read_bytes()
    judged = done("judge", stored, "--iterates", "latest", "sft", "--endpoint", endpoint, "--model", "m", "--json")
    assert json.loads(judged)["contradicting"] == small_run.HELDOUT_ROWS
    assert "judgements/iter_000-sft.json" in objects(stored)


def test_benchmarks_of_a_run_on_a_store_fetch_weights_only_where_they_are_loaded(
    stored: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval itself runs in tests/ray and tests/serving; here its request is looked at."""
    seen: list[set[str]] = []

    def measure(request: benchmarks.Request) -> dict[str, Any]:
        seen.append({path.name for path in Path(request.model).iterdir()})
        conditions = dict.fromkeys(("backend", "dtype", "max_length", "chat"))
        return {
            "task": {"metrics": {"acc": {"value": 0.5, "standard_error": None}}, "shots": 0, "warnings": []}
            | conditions
        }

    monkeypatch.setattr(benchmarks, "measure", measure)
    monkeypatch.setattr(benchmarks, "unreachable", lambda endpoint: None)
    code, out, error = call("eval", stored, "--tasks", "task", "--endpoint", "http://127.0.0.1:1/v1", "--json")
    assert code == 0, error
    run = RunDir(ObjectStorage(stored))
    assert json.loads(out) == {"iter_000": run.evaluation(1)["benchmarks"]}
    request = benchmarks.request_for(run.config(), 1, "nowhere", benchmarks=())
    benchmarks._measure_there(run, 1, request)
    assert "tokenizer.json" in seen[0] and "model.safetensors" not in seen[0]
    assert seen[1] == seen[0] | {"model.safetensors"}


def test_a_run_on_a_store_is_served_and_compared_from_a_copy_of_each_machine(
    stored: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands go as far as starting Ray, the keeper opens an iterate, and the engine's machine fetches it."""
    from spin_ray.serving import app, batch, server

    reached = []

    def connect(run: RunDir, config: SpinConfig) -> None:
        reached.append(run.storage.root)
        raise StageError("no Ray in this test")

    monkeypatch.setattr(app, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1 = ?"}\n')
    for module in (server, batch):
        monkeypatch.setattr(module, "connect_for", connect)
    for words in (
        ["serve", stored],
        ["compare", stored, "--prompts", prompts, "--models", "latest,sft"],
    ):
        code, _, error = call(*words)
        assert code == 1 and error.endswith("error: no Ray in this test\n")
    assert reached == [stored, stored] and list((tmp_path / "cache" / "votes").rglob("votes.sqlite"))

    opened = open_iterate(RunDir(ObjectStorage(stored)), "iter-0")
    there = pickle.loads(pickle.dumps(opened))  # noqa: S301 (as Ray does)
    shutil.rmtree(opened.folder)
    assert open_model(there.here().folder, "iter-0", trust_remote_code=False).digest == opened.digest
