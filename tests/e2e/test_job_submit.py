"""`ray job submit` with a working directory, against a real local cluster that asks for a token."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from program import ROOT, environment, micro_recipe

pytestmark = pytest.mark.e2e

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Dashboard address and environment of a head node with token authentication; stopped by its own process group."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    variables = environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard = free_port(), free_port()
    head = subprocess.Popen(
        [
            *RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={gcs}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        ],
        env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{dashboard}", variables
    finally:
        os.killpg(head.pid, 15)
        head.wait(timeout=60)


def wait_for_dashboard(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"waited 90 s for the dashboard at {address}")


def ray_job(
    address: str, variables: dict[str, str], working_dir: Path, command: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RAY, "job", command, "--address", address, *arguments],
        env=variables, cwd=working_dir, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def submit(
    address: str, variables: dict[str, str], working_dir: Path, *arguments: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return ray_job(
        address, variables, working_dir, "submit", "--working-dir", str(working_dir), *options, "--",
        sys.executable, "jobs/run_spin.py", *arguments,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def test_a_job_is_stopped_at_a_committed_point_and_a_second_submission_ends_it(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """Only what a user would ship is in the working directory; without the token nothing is taken. `ray job stop` sends
    SIGTERM, and SIGKILL 3 s later: by then the lease is free. Exit codes tell; a recipe with a typing error fails in
    words.
    """
    address, variables = cluster
    working_dir = tmp_path / "project"
    for name in ("spin_ray", "jobs"):
        shutil.copytree(ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = micro_recipe()
    recipe["data"]["max_rows"], recipe["train"]["epochs"] = 16, 1
    (working_dir / "jobs" / "recipes" / "micro.yaml").write_text(yaml.safe_dump(recipe))
    wait_for_dashboard(address)

    out = tmp_path / "run"
    refused = submit(address, variables | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, working_dir, "--help")
    assert refused.returncode != 0

    arguments = ("jobs/recipes/micro.yaml", "--out", str(out))
    options = ("--submission-id", "first", "--no-wait")
    assert submit(address, variables, working_dir, *arguments, options=options).returncode == 0
    wait_until((out / "iter_000" / "pairs" / "_MANIFEST.json").exists, 300, "the pairs of the first submission")
    answers = {path.name: path.read_bytes() for path in (out / "iter_000" / "generations").iterdir()}
    stopped = ray_job(address, variables, working_dir, "stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_until(lambda: not (out / "lease.json").exists(), 4, "the lease to be given back")
    assert "STOPPED" in ray_job(address, variables, working_dir, "status", "first").stdout
    logs = ray_job(address, variables, working_dir, "logs", "first").stdout
    assert "iter_000/generations" in logs and "\x1b[" not in logs, "progress must be plain lines"
    assert not (out / "LATEST").read_text().startswith("iter")

    done = submit(address, variables, working_dir, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "LATEST").read_text() == "iter_000\n"
    assert (
        json.loads((out / "iter_000" / "model" / "_MANIFEST.json").read_text())["files"]["model.safetensors"]["bytes"]
        > 0
    )
    assert "iter_000/training" in done.stdout + done.stderr, "progress must be in the job's log as plain lines"

    assert answers == {path.name: path.read_bytes() for path in (out / "iter_000" / "generations").iterdir()}

    bad = submit(address, variables, working_dir, "jobs/recipes/micro.yaml", "--out", str(out), "--train.epoch=2")
    assert bad.returncode == 1
    assert "train.epoch: unknown key" in bad.stdout + bad.stderr
