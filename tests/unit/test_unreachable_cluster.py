"""A cluster that is gone, or an address with a slip: an error soon, not a driver that waits."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

NOBODY = "127.0.0.1:9"
"""No unprivileged process listens there."""


@pytest.mark.slow
def test_a_run_at_an_address_that_nobody_answers_ends_with_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = {"path": "embedded:tiny-llama", "max_length": 96}
    content = {"model": model, "data": {"train": "embedded:arithmetic-train"}}
    recipe.write_text(yaml.safe_dump(content | {"generation": {"sampling": {"max_tokens": 24}}}))
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "spin_ray.cli", "run", recipe, "--out", tmp_path / "run"],
        env=os.environ | {"RAY_ADDRESS": NOBODY}, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert f"cluster.address {NOBODY}: cannot be reached" in ended.stderr
    assert time.monotonic() - started < 90, "Ray alone would try for 14 minutes"
    assert not (tmp_path / "run" / "lease.json").exists(), "another driver can take the run"
