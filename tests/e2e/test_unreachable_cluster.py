"""A cluster that is gone, or an address with a slip: an error soon, not a driver that waits."""

import time
from pathlib import Path

import pytest

from tests.support.program import micro_recipe, spin_ray, write_recipe

pytestmark = pytest.mark.e2e

NOBODY = "127.0.0.1:9"
"""No unprivileged process listens there."""


def test_a_run_at_an_address_that_nobody_answers_ends_with_one_line(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, micro_recipe()), tmp_path / "run"
    started = time.monotonic()
    ended = spin_ray("run", recipe, "--out", out, f"--cluster.address={NOBODY}", timeout_s=180)
    assert ended.returncode == 2, ended.stderr
    assert f"cluster.address {NOBODY}: cannot be reached" in ended.stderr
    assert time.monotonic() - started < 90, "Ray alone would try for 14 minutes"
    assert not (out / "lease.json").exists(), "another driver can take the run"
