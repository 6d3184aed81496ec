"""One real server for the folder: Ray Serve and vLLM in processes of their own, as a user starts them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from tiny_runs import make_run

from spin_ray.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
START_S = 420


@dataclass(frozen=True)
class Served:
    run: RunDir
    url: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def card(self, name: str) -> dict[str, str]:
        return httpx.get(f"{self.url}/v1/models/{name}", timeout=30).raise_for_status().json()

    def wait_until_serves(self, name: str, iterate: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                if self.card(name)["iterate"] == iterate:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"{name} was not {iterate} within {START_S} s")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``sft`` and ``latest`` (iter-0 at first) of a tiny run."""
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder / "run", iterates=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "spin_ray.cli", "serve", str(run.storage.root), "--port", str(port)]
    options = ["--serving.max_concurrent=8", "--serving.max_tokens=200"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        served = Served(run, f"http://127.0.0.1:{port}")
        served.wait_until_serves("latest", "iter-0")
        served.wait_until_serves("sft", "sft")
        yield served
    except BaseException:
        print((folder / "log").read_text())
        raise
    finally:
        server.terminate()
        assert server.wait(timeout=90) == 0
