"""A server as its client sees it."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil

from spin_ray.run_dir.run_dir import RunDir
from tests.support.program import ROOT, environment

START_S = 420
ANSWER_S = 300
"""Longest waits, in seconds, for an engine and for an answer. Two busy cores without bf16 take minutes."""


@contextmanager
def serving(run: RunDir, port: int, command: list[str], log_file: Path, serves: dict[str, str]) -> "Iterator[Served]":
    """Starts a server, waits until each name of ``serves`` is its iterate, and ends it; a failure shows the log."""
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        served = Served(run, f"http://127.0.0.1:{port}", server)
        for name, iterate in serves.items():
            served.wait_until_serves(name, iterate)
        yield served
    except BaseException:
        print(log_file.read_text())
        raise
    finally:
        server.terminate()
        assert server.wait(timeout=90) == 0


@dataclass(frozen=True)
class Served:
    run: RunDir
    url: str
    process: "subprocess.Popen[bytes]"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S)

    def card(self, name: str) -> dict[str, str]:
        return httpx.get(f"{self.url}/v1/models/{name}", timeout=30).raise_for_status().json()

    def problems(self) -> dict[str, str]:
        return httpx.get(f"{self.url}/v1/models", timeout=30).raise_for_status().json().get("problems", {})

    def wait_until_serves(self, name: str, iterate: str) -> None:
        deadline = time.monotonic() + START_S
        with httpx.Client(base_url=self.url, timeout=30) as client:  # to make one takes as long as ten questions
            while time.monotonic() < deadline:
                try:
                    if client.get(f"/v1/models/{name}").raise_for_status().json()["iterate"] == iterate:
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(0.5)
        raise AssertionError(f"{name} was not {iterate} within {START_S} s")

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def replicas(self, name: str, least: int = 1) -> list[psutil.Process]:
        """Waits for ``least`` processes of Ray Serve's replicas with ``name`` in their application or deployment.

        A replica that answers has another title meanwhile.
        """
        deadline = time.monotonic() + 30
        while len(found := self._titled("ServeReplica", name)) < least:
            assert time.monotonic() < deadline, f"{len(found)} of {least} replicas of {name!r} were found within 30 s"
            time.sleep(0.1)
        return found

    def engines(self) -> list[psutil.Process]:
        return self._titled("EngineCore")

    def _titled(self, *parts: str) -> list[psutil.Process]:
        found = []
        for process in self.family():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if all(part in title for part in parts):
                found.append(process)
        return found

    def memory(self) -> int:
        """Returns the bytes that all processes hold; shared ones are counted once.

        Without libraries: they are shared with whatever else runs, and count for more once that has ended.
        """
        kib = 0
        for process in self.family():
            with suppress(OSError):  # it has just ended
                held = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                kib += sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", held, re.MULTILINE)))
        return kib * 1024

    @contextmanager
    def connection(self, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        host, port = self.url.removeprefix("http://").split(":")
        with socket.socket() as raw:
            if receive_buffer:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            raw.settimeout(60)
            raw.connect((host, int(port)))
            yield raw
