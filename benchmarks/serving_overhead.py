"""How much of a bare vLLM OpenAI server's speed does `spin-ray serve` keep, and what does it add to the first token?

    python benchmarks/serving_overhead.py [--clients 8] [--requests 32] [--max-tokens 32] [--rounds 6] [--overload-s 30]
    python benchmarks/serving_overhead.py --only-overload

Both are loaded in turn, A B B A A B, with one stream, then with `--clients` streams. Answer lengths vary: with equal
lengths all clients would ask again at once. Then ten times too many clients ask `spin-ray serve`.
"""

import argparse
import asyncio
import contextlib
import heapq
import json
import multiprocessing
import os
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy
from harness import MODEL, RESULTS, Row, at_least, at_most, prepare, record

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ServingConfig
from spin_ray.inputs.check import check_recipe
from spin_ray.inputs.embedded import resolve
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage

LENGTH = 512
READY_S = 600
"""Longest start of a server."""
PLACES = ServingConfig().max_concurrent
TARGETS = ((50, 15), (99, 60))
"""Percentile, and milliseconds that it may grow by."""
Firsts = dict[str, list[float]]
ENGINE = {"dtype": "bfloat16", "enforce_eager": True, "cpu_kv_cache_gib": 1, "max_num_seqs": 32}
_SO_TIMESTAMPNS = 35
"""Linux's socket option that is missing in ``socket``: ``recvmsg`` tells when the kernel received the bytes."""
PROMPT = [{"role": "system", "content": ""}, {"role": "user", "content": "Tell a long story about a lighthouse."}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--overload-s", type=float, default=30)
    parser.add_argument("--only-overload", action="store_true")
    options = parser.parse_args()
    prepare()
    if options.only_overload:
        with tempfile.TemporaryDirectory() as folder, ours(Path(folder)) as url:
            record(overload(url, options.overload_s))
        return
    ratios: list[float] = []
    alone: list[Firsts] = []
    loaded: list[Firsts] = []
    with tempfile.TemporaryDirectory() as folder, bare() as one, ours(Path(folder)) as other:
        urls = {"bare": one, "ours": other}
        for number in range(-1, options.rounds):  # the first round warms up
            speed, firsts, firsts_loaded = {}, {}, {}
            for side in sorted(urls, reverse=number % 2 == 1):
                firsts[side], _ = asyncio.run(load(urls[side], 1, options.requests, 4))
                firsts_loaded[side], speed[side] = asyncio.run(
                    load(urls[side], options.clients, options.requests, options.max_tokens)
                )
            if number >= 0:
                ratios.append(speed["ours"] / speed["bare"])
                alone.append(firsts)
                loaded.append(firsts_loaded)
                medians = {side: round(1000 * statistics.median(values), 1) for side, values in firsts.items()}
                print(json.dumps({side: [round(speed[side], 1), medians[side]] for side in urls}), flush=True)
        overloaded = overload(other, options.overload_s)
    streams = f"{options.clients} streams at once, {options.max_tokens} tokens each on average"
    share = at_least("serving, share of a bare vLLM server's tokens a second", ratios, 0.9, streams)
    rows = [added(alone, percent, target, "one stream at a time") for percent, target in TARGETS]
    record([share, *rows, *(added(loaded, percent, target, streams) for percent, target in TARGETS), *overloaded])


def added(rounds: list[Firsts], percent: int, target: float, streams: str) -> Row:
    """Returns the milliseconds that a percentile of the time to first token grows by; the spread is that of rounds."""

    def grown(of: list[Firsts]) -> float:
        value = {
            side: float(numpy.percentile([first for firsts in of for first in firsts[side]], percent))
            for side in ("bare", "ours")
        }
        return round(1000 * (value["ours"] - value["bare"]), 1)

    value, each = grown(rounds), [grown([one]) for one in rounds]
    requests = sum(len(firsts["ours"]) for firsts in rounds)
    return Row(
        f"serving, added to the first token, p{percent}, {streams.partition(',')[0]}", value, f"<= {target:g}",
        value <= target, len(rounds), (min(each), max(each)), f"milliseconds; {requests} requests of each server",
    )  # fmt: skip


async def load(url: str, clients: int, requests: int, max_tokens: int) -> tuple[list[float], float]:
    """Returns seconds to the first token of each request, and tokens per second of all."""
    firsts: list[float] = []
    longest = [max_tokens // 2 + 7 * number % (max_tokens + 1) for number in range(requests)]
    waiting = iter(longest)
    body = {"model": "sft", "messages": PROMPT, "temperature": 0, "stream": True}
    tokens = 0

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        for length in waiting:
            started, first = time.perf_counter(), None
            options = {"max_tokens": length, "stream_options": {"include_usage": True}}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body | options) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    if first is None:
                        first = time.perf_counter() - started
                    if '"usage":{' in line:
                        tokens += json.loads(line[6:])["usage"]["completion_tokens"]
            assert first is not None
            firsts.append(first)

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=clients)) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        seconds = time.perf_counter() - started
    assert tokens == sum(longest), "every answer must be cut at its longest, so that both do the same work"
    return firsts, tokens / seconds


def overload(url: str, seconds: float) -> list[Row]:
    """Returns p99 of refusals and of `/healthz` in milliseconds; `/healthz` is timed by its own process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        checked = pool.submit(health_checks, url, seconds)
        answered = Crowd(url, 10 * PLACES).insist(seconds)
        healthy = checked.result()
    assert set(answered) <= {200, 503}, sorted(answered)
    refused = answered[503]
    clients = f"{10 * PLACES} clients for {seconds:g} s, {len(answered[200])} answers, {len(refused)} refusals"
    read = f"p50 {_percentile(refused, 0, 50)}; p99 as the client's process read them {_percentile(refused, 1, 99)}"
    found = {
        "serving, p99 of a refusal under ten times the load": (_percentile(refused, 0, 99), 100, f"; {read}"),
        "serving, p99 of /healthz under ten times the load": (_percentile([(it,) for it in healthy], 0, 99), 50, ""),
    }
    return [
        at_most(name, [value], most, f"milliseconds; {clients}{more}") for name, (value, most, more) in found.items()
    ]


def _percentile(times: Sequence[tuple[float, ...]], column: int, percent: int) -> float:
    return round(1000 * float(numpy.percentile([time[column] for time in times], percent)), 1)


class Crowd:
    """Clients on sockets of one thread: an HTTP library would use more CPU for hundreds of clients than the server.

    The kernel notes when a reply arrives, as this process may read it later.
    """

    def __init__(self, url: str, clients: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._address, self._clients = (host, int(port)), clients
        body = json.dumps({"model": "sft", "messages": PROMPT, "max_tokens": 16}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self._poll = selectors.DefaultSelector()
        self._replies: dict[socket.socket, bytes] = {}
        self._asked: dict[socket.socket, float] = {}

    def insist(self, seconds: float) -> dict[int, list[tuple[float, float]]]:
        """Returns by status the seconds of each request until its reply arrived, and until it was read.

        Clients start one after another in the first second; a refused client asks again a second later.
        """
        found: dict[int, list[tuple[float, float]]] = defaultdict(list)
        begun = time.time()
        due: list[tuple[float, int, socket.socket | None]]
        due = [(begun + number / self._clients, number, None) for number in range(self._clients)]
        while due or self._asked:
            while due and due[0][0] <= time.time():
                when, number, client = heapq.heappop(due)
                if when < begun + seconds:
                    self._ask(client or self._connect(number))
            for key, _ in self._poll.select(max(0.0, due[0][0] - time.time()) if due else 0.1):
                client: Any = key.fileobj
                if reply := self._read(client):
                    status, *times = reply
                    found[status].append((times[0], times[1]))
                    heapq.heappush(due, (time.time() + (status == 503), key.data, client))
        return found

    def _connect(self, number: int) -> socket.socket:
        client = socket.create_connection(self._address)
        client.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._poll.register(client, selectors.EVENT_READ, number)
        return client

    def _ask(self, client: socket.socket) -> None:
        self._replies[client], self._asked[client] = b"", time.time()
        client.sendall(self._request)

    def _read(self, client: socket.socket) -> tuple[int, float, float] | None:
        """Returns a reply's status, the seconds until it arrived and until now; None while it is not whole."""
        data, told, _, _ = client.recvmsg(2**16, 64)
        assert data, "the server has closed a connection"
        self._replies[client] += data
        head, _, body = self._replies[client].partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not length or len(body) < int(length):
            return None
        asked = self._asked.pop(client)
        whole, parts = struct.unpack("qq", told[0][2][:16])
        return int(head[9:12]), whole + parts / 1e9 - asked, time.time() - asked


def health_checks(url: str, seconds: float) -> list[float]:
    found, end = [], time.monotonic() + seconds
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < end:
            started = time.perf_counter()
            client.get(f"{url}/healthz").raise_for_status()
            found.append(time.perf_counter() - started)
            time.sleep(0.1)
    return found


@contextlib.contextmanager
def bare() -> Iterator[str]:
    port = free_port()
    arguments = {
        "model": resolve(MODEL), "served-model-name": "sft", "host": "127.0.0.1", "port": port,
        "dtype": ENGINE["dtype"],
        "max-model-len": LENGTH, "max-num-seqs": ENGINE["max_num_seqs"], "generation-config": "vllm",
        "load-format": "safetensors", "max-num-batched-tokens": max(LENGTH, 2048), "uvicorn-log-level": "warning",
        "worker-extension-cls": "spin_ray.serving.cpu_worker.CpuWorker",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(ENGINE["cpu_kv_cache_gib"]), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    with process("serving_bare", command, environment) as server:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", "")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[str]:
    config = SpinConfig.model_validate(
        {
            "model": {"path": MODEL, "max_length": LENGTH},
            "data": {"train": "embedded:chitchat-train"},
            "generation": {"engine": ENGINE, "sampling": {"max_tokens": 128}},
        }
    )
    run = RunDir(Storage(folder / "run"))
    run.begin(config, check_recipe(config).facts())
    run.publish(0)
    port = free_port()
    command = [sys.executable, "-m", "spin_ray", "serve", str(run.storage.root), "--port", str(port)]
    with process("serving_ours", [*command, "--models", "sft"], {"RAY_AUTH_MODE": "token"}) as server:
        wait_until_ready(server, f"http://127.0.0.1:{port}/readyz", "sft")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def process(name: str, command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    with (RESULTS / f".{name}.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
    try:
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=120)


def wait_until_ready(server: "subprocess.Popen[bytes]", url: str, word: str) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            response = httpx.get(url, timeout=5)
            if response.status_code == 200 and word in response.text:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url} did not answer within {READY_S} s; {RESULTS} has the logs")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    main()
