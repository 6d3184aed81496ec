"""Processes of a real run (Ray, vLLM, FSDP2) are killed with SIGKILL at random moments: the run ends as if nothing was.

`make chaos` kills one after another of all kinds, for as long as it is told: each costs a minute, too long for CI.
"""

import os
import random
import time
from pathlib import Path

import pytest

from tests.support.rough_run import run_calmly, run_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the run that nothing disturbed."""
    return run_calmly(tmp_path_factory.mktemp("calm"))


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 2**32)
    print(f"\nCHAOS_SEED={seed}", flush=True)
    return random.Random(seed)


@pytest.mark.skipif("CHAOS_S" not in os.environ, reason="make chaos sets how many seconds it may take")
@pytest.mark.timeout(0)
def test_random_kills_one_run_after_another(tmp_path: Path, calm: dict[str, str], chance: random.Random) -> None:
    kills = run_for(float(os.environ["CHAOS_S"]), tmp_path, calm, chance)
    print(f"{len(kills)} kills, and every run ended as if nothing was")
