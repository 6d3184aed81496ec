"""`ray job submit` with a working directory, against a real local cluster that asks for a token."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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


def submit(
    address: str, variables: dict[str, str], working_dir: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *RAY, "job", "submit", "--address", address, "--working-dir", str(working_dir), "--",
            sys.executable, "jobs/run_spin.py", *arguments,
        ],
        env=variables, cwd=working_dir, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def test_a_submitted_job_runs_and_its_exit_code_tells(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Only what a user would ship is in the working directory; a recipe with a typing error fails the job in words."""
    address, variables = cluster
    working_dir = tmp_path / "project"
    for name in ("spin_ray", "jobs"):
        shutil.copytree(ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = micro_recipe()
    recipe["data"]["max_rows"], recipe["train"]["epochs"] = 16, 1
    (working_dir / "jobs" / "recipes" / "micro.yaml").write_text(yaml.safe_dump(recipe))
    wait_for_dashboard(address)

    out = tmp_path / "run"
    done = submit(address, variables, working_dir, "jobs/recipes/micro.yaml", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "LATEST").read_text() == "iter_000\n"
    assert (
        json.loads((out / "iter_000" / "model" / "_MANIFEST.json").read_text())["files"]["model.safetensors"]["bytes"]
        > 0
    )
    assert "iter_000/training" in done.stdout + done.stderr, "progress must be in the job's log as plain lines"

    bad = submit(address, variables, working_dir, "jobs/recipes/micro.yaml", "--out", str(out), "--train.epoch=2")
    assert bad.returncode == 1
    assert "train.epoch: unknown key" in bad.stdout + bad.stderr
