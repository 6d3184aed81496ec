"""`ray job submit` with a working directory, against a real local cluster that asks for a token."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from program import ROOT, environment, micro_recipe
from ray_head import RAY, Head, ray_head

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster() -> Iterator[Head]:
    with ray_head(environment(), cpus=2) as head:
        yield head


def submit(head: Head, working_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *RAY, "job", "submit", "--address", head.dashboard, "--working-dir", str(working_dir), "--",
            sys.executable, "jobs/run_spin.py", *arguments,
        ],
        env=head.variables, cwd=working_dir, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def test_a_submitted_job_runs_and_its_exit_code_tells(cluster: Head, tmp_path: Path) -> None:
    """Only what a user would ship is in the working directory; a recipe with a typing error fails the job in words."""
    working_dir = tmp_path / "project"
    for name in ("spin_ray", "jobs"):
        shutil.copytree(ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = micro_recipe()
    recipe["data"]["max_rows"], recipe["train"]["epochs"] = 16, 1
    (working_dir / "jobs" / "recipes" / "micro.yaml").write_text(yaml.safe_dump(recipe))

    out = tmp_path / "run"
    done = submit(cluster, working_dir, "jobs/recipes/micro.yaml", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "LATEST").read_text() == "iter_000\n"
    assert (
        json.loads((out / "iter_000" / "model" / "_MANIFEST.json").read_text())["files"]["model.safetensors"]["bytes"]
        > 0
    )
    assert "iter_000/training" in done.stdout + done.stderr, "progress must be in the job's log as plain lines"

    bad = submit(cluster, working_dir, "jobs/recipes/micro.yaml", "--out", str(out), "--train.epoch=2")
    assert bad.returncode == 1
    assert "train.epoch: unknown key" in bad.stdout + bad.stderr
