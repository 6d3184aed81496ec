"""A head node of `ray start`, with dashboard, metrics and a token."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = "0123456789abcdef" * 4
_given: set[int] = set()


@dataclass(frozen=True)
class Head:
    folder: Path
    """Ray's sessions with their logs."""
    variables: dict[str, str]
    dashboard_port: int
    metrics_port: int
    authorization: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"


@contextmanager
def ray_head(environment: dict[str, str], cpus: int) -> Iterator[Head]:
    """Yields a head whose dashboard listens, then kills it: a stop takes half a minute.

    The folder's path is short, as sockets are in it.
    """
    folder = Path(tempfile.mkdtemp(prefix="head-"))
    (folder / "token").write_text(TOKEN)
    variables = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    head = Head(folder, variables, free_port(), free_port())
    process = subprocess.Popen(
        [
            *RAY, "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
            f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={head.dashboard_port}",
            f"--metrics-export-port={head.metrics_port}", f"--temp-dir={folder}",
            # Ray's fixed ports: another head may be up beside this one.
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0",
        ],
        env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(head.dashboard_port)
        yield head
    finally:
        _kill(process.pid)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Returns a free port that nobody gets who asks for any: it is bound only seconds later.

    Linux gives those from 32768 on, and Ray's workers take theirs below 20000. Each process of pytest-xdist has ports
    of its own, and gives none twice.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(20_000 + number % count, 32_768, count)
    while True:
        port = random.SystemRandom().choice(ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def _kill(pid: int) -> None:
    """Kills a process and all below it, from the top, so that none starts another one."""
    head = psutil.Process(pid)
    family = [head, *head.children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not psutil.wait_procs(family[1:], timeout=60)[1], "waited 60 s for a killed head's processes"


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"waited 90 s for port {port}")
