"""`ray job submit` with a working directory, against a real local cluster that asks for a token."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.program import ROOT, environment, micro_recipe
from tests.support.ray_head import RAY, Head, ray_head

pytestmark = pytest.mark.e2e


OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Holds oneDNN and torch at the instructions of an older processor; `make avx2` tests the learner with them."""


@pytest.fixture
def cluster() -> Iterator[Head]:
    with ray_head(environment() | OLDER, cpus=2) as head:
        yield head


def submit(
    head: Head, working_dir: Path, *arguments: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    job = [*RAY, "job", "submit", "--address", head.dashboard, "--working-dir", str(working_dir), *options]
    return subprocess.run(
        [*job, "--", sys.executable, "jobs/run_spin.py", *arguments],
        env=head.variables, cwd=working_dir, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def ask(head: Head, path: str, method: str = "GET") -> dict[str, Any]:
    """Returns what Ray's API of jobs says, which `ray job` asks, too."""
    found = httpx.request(method, f"{head.dashboard}/api/jobs/{path}", headers=head.authorization, timeout=60)
    return found.raise_for_status().json()


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def test_a_job_is_stopped_at_a_committed_point_and_a_second_submission_ends_it(cluster: Head, tmp_path: Path) -> None:
    """Only what a user would ship is in the working directory; without the token nothing is taken. `ray job stop` sends
    SIGTERM, and SIGKILL 3 s later: by then the lease is free. Exit codes tell; a recipe with a typing error fails in
    words. All of it happens with the instructions of an older processor.
    """
    working_dir = tmp_path / "project"
    for name in ("spin_ray", "jobs"):
        shutil.copytree(ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = micro_recipe()
    recipe["data"]["max_rows"], recipe["train"]["epochs"] = 16, 1
    (working_dir / "jobs" / "recipes" / "micro.yaml").write_text(yaml.safe_dump(recipe))

    out = tmp_path / "run"
    refused = httpx.post(f"{cluster.dashboard}/api/jobs/", json={"entrypoint": "true"}, timeout=60)
    assert refused.status_code in (401, 403), refused.text

    arguments = ("jobs/recipes/micro.yaml", "--out", str(out))
    options = ("--submission-id", "first", "--no-wait")
    first = partial(submit, cluster, working_dir, *arguments, options=options)
    wait_until(
        lambda: first().returncode == 0, 90, "the head to take a job"
    )  # its agent is up later than the dashboard
    wait_until((out / "iter_000" / "pairs" / "_MANIFEST.json").exists, 300, "the pairs of the first submission")
    answers = {path.name: path.read_bytes() for path in (out / "iter_000" / "generations").iterdir()}
    assert ask(cluster, "first/stop", "POST") == {"stopped": True}  # at once: a command would start while training ends
    wait_until(lambda: ask(cluster, "first")["status"] in ("STOPPED", "SUCCEEDED", "FAILED"), 60, "the job to stop")
    wait_until(lambda: not (out / "lease.json").exists(), 4, "the lease to be given back")
    assert ask(cluster, "first")["status"] == "STOPPED"
    logs = ask(cluster, "first/logs")["logs"].splitlines()
    progress = [line for line in logs if "iter_000/generations" in line]
    assert progress and not any("\x1b" in line or "\r" in line for line in progress), "progress must be plain lines"
    assert not (out / "LATEST").read_text().startswith("iter")

    done = submit(cluster, working_dir, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "LATEST").read_text() == "iter_000\n"
    assert (
        json.loads((out / "iter_000" / "model" / "_MANIFEST.json").read_text())["files"]["model.safetensors"]["bytes"]
        > 0
    )
    steps = [json.loads(line)["step"] for line in (out / "iter_000" / "train_log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3], "16 pairs / 4"
    assert "iter_000/training" in done.stdout + done.stderr, "progress must be in the job's log as plain lines"

    assert answers == {path.name: path.read_bytes() for path in (out / "iter_000" / "generations").iterdir()}

    bad = submit(cluster, working_dir, "jobs/recipes/micro.yaml", "--out", str(out), "--train.epoch=2")
    assert bad.returncode == 1
    assert "train.epoch: unknown key" in bad.stdout + bad.stderr
