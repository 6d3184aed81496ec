"""Servers of a judge that do not judge: each is named with its cure, and what was judged is kept."""

import json
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from spin_ray.errors import ConfigError, StageError
from spin_ray.report import benchmarks, harness, judge
from spin_ray.report.endpoint import Unanswered, _retry_after, unreachable
from spin_ray.report.harness import measure
from spin_ray.report.harness_request import Benchmark, Request
from spin_ray.report.judge import Judge
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.proxies import keep_loopback_from_proxies, proxy_of
from tests.support.made_up_run import made_up_run

Answer = tuple[int, dict[str, str], bytes | threading.Event]
"""Status, headers and body; with an event none, until it is set or 30 s have passed."""
JSON = {"Content-Type": "application/json"}
FIRST = (200, JSON, json.dumps({"choices": [{"message": {"content": "[[A]]"}}]}).encode())


def refusal(status: int, message: str, **headers: str) -> Answer:
    return status, JSON | headers, json.dumps({"error": {"message": message}}).encode()


@contextmanager
def server(*answers: Answer, models: tuple[str, ...] = ()) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Gives the answers one after another, the last one for ever; yields its URL and what it is asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.tell(200, JSON, json.dumps({"data": [{"id": name} for name in models]}).encode())

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, headers, body = answers[min(len(asked), len(answers)) - 1]
            if isinstance(body, threading.Event):
                body.wait(30)
            else:
                self.tell(status, headers, body)

        def tell(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    http.server_close()


def judged(folder: Path, url: str, **options: Any) -> dict[str, Any]:
    run = made_up_run(folder)
    asked = Judge(**{"endpoint": url, "model": "j", "parallel": 1, "wait_s": 0.01, "timeout_s": 5} | options)
    return judge.run(run, run.config(), "iter_001", "sft", asked, limit=9)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (refusal(401, "Incorrect API key"), "HTTP 401: Incorrect API key; set OPENAI_API_KEY to a key"),
        (refusal(404, "no\nmodel j"), "HTTP 404: no model j; the server has big, small; is that"),
        ((404, {"Content-Type": "text/html"}, b"<html>\n<b>"), "HTTP 404: Not Found '<html> <b>'; the server has"),
        ((200, {"Content-Type": "text/html"}, b"<html>Sign in"), "not JSON ('<html>Sign in'); a base URL usually"),
        ((200, JSON, b"{}"), r"an answer without choices[0].message.content"),
        ((200, JSON, b'{"choices": [{"message": {"content": ["a"]}}]}'), "without choices[0].message.content"),
        (refusal(429, "slow down", **{"Retry-After": "300"}), "HTTP 429: slow down; it asks to wait 300 s; run the"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_is_named_at_once_with_its_cure(tmp_path: Path, answer: Answer, told: str) -> None:
    """What would be refused again is the user's error; a busy server may answer later."""
    kind = StageError if answer[0] == 429 else ConfigError
    with server(answer, models=("big", "small")) as (url, asked), pytest.raises(kind) as caught:
        judged(tmp_path, url)
    assert told in str(caught.value) and str(caught.value).startswith(f"{url}: gave no judgement (")
    assert "\n" not in str(caught.value) and len(asked) == 1


@pytest.mark.slow
def test_a_wait_that_the_server_asks_for_is_kept(tmp_path: Path) -> None:
    started = time.monotonic()
    with server(refusal(429, "busy", **{"Retry-After": "1"}), FIRST) as (url, asked):
        assert judged(tmp_path, url)["contradicting"] == 3
    assert len(asked) == 7 and time.monotonic() - started > 1
    assert _retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == _retry_after("soon") == _retry_after(None) == 0


def test_what_was_judged_before_a_failure_is_kept(tmp_path: Path) -> None:
    with server(FIRST, FIRST, FIRST, refusal(500, "out of memory")) as (url, asked):
        with pytest.raises(StageError, match=r"HTTP 500: out of memory.*; what was judged is kept"):
            judged(tmp_path / "run", url, tries=2)
        assert len(asked) == 5
    with server(FIRST) as (url, asked):
        run = RunDir(Storage(tmp_path / "run"))
        again = judge.run(run, run.config(), "iter_001", "sft", Judge(endpoint=url, model="j"), limit=9)
    assert again["contradicting"] == 3 and len(asked) == 3


@pytest.mark.slow
def test_a_server_that_lists_models_and_is_silent_when_asked_is_asked_once(tmp_path: Path) -> None:
    """One that has answered before is asked again."""
    held = threading.Event()
    slow: Answer = (200, JSON, held)
    with server(slow) as (url, asked), pytest.raises(StageError, match=r"no answer within 3 s; is the model loaded"):
        judged(tmp_path / "run", url, timeout_s=3)
    assert len(asked) == 1
    with server(FIRST, slow, FIRST) as (url, asked):
        assert judged(tmp_path / "other", url, timeout_s=3)["contradicting"] == 3
    assert len(asked) == 7
    held.set()


def test_equal_replies_are_judged_in_both_orders_also_after_a_failure(tmp_path: Path) -> None:
    """A judge that prefers the first place contradicts itself; one answer for both orders would be a win."""
    run = made_up_run(tmp_path)
    kept = judge.Kept(run.storage, "judgements/x.jsonl")
    orders = [judge.Question("p", *order, "the same task") for order in (("one", "other"), ("other", "one"))]
    for order in orders:
        kept.add(judge.Judgement("p", order.first, order.second, "first", "", "j", order.digest))
    kept.save()
    again = judge.Kept(run.storage, "judgements/x.jsonl")
    found = judge.summarise([it for order in orders if (it := again.find("j", order))], "one", "other", {"p": 0})
    assert (found["wins"], found["contradicting"], found["ties"]) == (0, 1, 1)


def test_a_model_with_a_temperature_of_its_own_is_asked_without_one(tmp_path: Path) -> None:
    with server(refusal(400, "Unsupported value: 'temperature'"), FIRST) as (url, asked):
        assert judged(tmp_path, url, tries=1)["contradicting"] == 3
    assert ["temperature" in body for body in asked] == [True] + [False] * 6


def test_an_iterate_is_not_judged_against_itself(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    with pytest.raises(ConfigError, match="both names are of sft"):
        judge.run(run, run.config(), "sft", "sft", Judge(endpoint="http://x", model="j"), limit=1)


def test_an_endpoint_without_the_iterate_is_named_before_lm_eval_starts() -> None:
    with server(refusal(404, "no iter-7"), models=("sft",)) as (url, asked), pytest.raises(Unanswered) as caught:
        measure(Request(model="m", name="iter-7", endpoint=url, benchmarks=(Benchmark("gsm8k", 0),)))
    assert "HTTP 404: no iter-7; the server has sft" in str(caught.value) and len(asked) == 1


def test_lm_eval_starts_though_the_endpoint_is_busy_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent endpoint is an error: lm-eval would wait for it far longer."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # its import takes seconds
    request = Request(model="m", name="sft", endpoint="", benchmarks=(Benchmark("gsm8k", 0),))
    for status in (429, 503):
        busy = refusal(status, "busy", **{"Retry-After": "1"})
        with server(busy) as (url, asked), pytest.raises(ConfigError, match="lm-eval is not installed"):
            measure(replace(request, endpoint=url))
        assert len(asked) == 1
    monkeypatch.setattr(harness, "_FIRST_ANSWER_S", 0.2)
    held = threading.Event()
    with server((200, JSON, held)) as (url, _), pytest.raises(Unanswered, match=r"no answer within 0.2 s"):
        measure(replace(request, endpoint=url))
    held.set()


def test_an_endpoint_that_refuses_the_key_is_the_users_error_for_eval(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    with server(refusal(401, "Incorrect API key")) as (url, _), pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        benchmarks.run(run, run.config(), 0, benchmarks.request_for(run.config(), 0, "/m", benchmarks=(), endpoint=url))


def test_a_server_of_this_machine_is_asked_without_the_proxy_and_another_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy here, a server too, would refuse and read the key."""
    with server(refusal(403, "not for you")) as (proxy, seen), server(FIRST) as (url, asked):
        behind = proxy.removesuffix("/v1").replace("//", "//me:SECRETSECRET@")
        set_proxy(monkeypatch, behind)
        assert judged(tmp_path / "run", url)["contradicting"] == 3
        assert not seen and len(asked) == 6
        told = f"(asked through the proxy {proxy.removesuffix('/v1')}; NO_PROXY leaves it out)"
        with pytest.raises(Unanswered) as caught:
            measure(Request(model="m", name="sft", endpoint="http://h.invalid/v1", benchmarks=(), chat=True))
        assert told in str(caught.value) and len(seen) == 1
    with pytest.raises(StageError) as failed:  # the proxy is gone
        judged(tmp_path / "other", "http://h.invalid/v1", tries=1)
    assert told in str(failed.value) and told in (unreachable("http://h.invalid/v1") or "")


def test_every_client_leaves_this_machine_out_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp asks ``proxy_bypass``, and requests has rules of its own."""
    requests = pytest.importorskip("requests")
    set_proxy(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", ".intra")
    monkeypatch.setenv("NO_PROXY", "10.0.0.9")
    urls = ["http://127.0.0.1:80/v1", "http://127.0.0.2/v1", "http://[::1]:80/v1", "http://localhost:80/v1"]
    assert all(requests.utils.get_environ_proxies(url) for url in urls)
    keep_loopback_from_proxies(*urls, "http://h.invalid/v1")
    assert not any(requests.utils.get_environ_proxies(url) for url in [*urls, "http://x.intra/", "http://10.0.0.9/"])
    assert all(urllib.request.proxy_bypass(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))
    assert proxy_of("http://h.invalid/v1") == "http://127.0.0.1:9" and proxy_of("http://x.intra/") is None


@pytest.mark.parametrize("given", ["http://me:secret@proxy:9", "me:secret@proxy:9", "proxy:9"])
def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    set_proxy(monkeypatch, given)
    assert proxy_of("http://h.invalid/v1") == ("http://proxy:9" if "://" in given else "proxy:9")


def set_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)
