"""Processes of a real run (Ray, vLLM, FSDP2) are killed with SIGKILL at random moments: the run ends as if nothing was.

CI kills a few; `make chaos` one after another of all kinds, for as long as it is told.
"""

import hashlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import write_recipe
from rough_run import CHECKPOINT_EVERY, KINDS, REPLICAS, STEPS, Kill, RoughRun, plan, recipe

from spin_ray.run_dir import MANIFEST, Manifest, read_json_lines
from spin_ray.storage import Storage

pytestmark = pytest.mark.e2e


def committed(out: Path) -> dict[str, str]:
    """Digests of all files that a manifest lists."""
    found = {}
    for manifest in out.rglob(MANIFEST):
        if ".attempts" not in manifest.parts:
            for name in Manifest.from_bytes(manifest.read_bytes()).files:
                path = manifest.parent / name
                found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    RoughRun(write_recipe(folder, recipe()), folder / "run", random.Random()).to_the_end([])
    return folder / "run"


@pytest.fixture
def chance() -> Iterator[random.Random]:
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 2**32)
    print(f"\nCHAOS_SEED={seed}", flush=True)
    return random.Random(seed)


def ends_as_if_nothing_was(folder: Path, calm: Path, kinds: list[str], chance: random.Random) -> list[Kill]:
    kills, rough = plan(kinds, chance), RoughRun(write_recipe(folder, recipe()), folder / "run", chance)
    rough.to_the_end(kills)
    assert committed(folder / "run") == committed(calm), "rows and weights are bitwise those of the undisturbed run"
    steps = [line["step"] for line in read_json_lines(Storage(folder / "run"), "iter_000/train_log.jsonl")]
    assert steps == list(range(STEPS))
    print(f"lost: {rough.lost}; ended by itself after: {[kill.kind for kill in kills if not kill.same_command]}")
    assert rough.lost["shards"] <= REPLICAS * len(kills), "at most the shards in flight"
    assert rough.lost["steps"] <= (2 * CHECKPOINT_EVERY) * len(kills), "at most the steps since the last checkpoint"
    return kills


@pytest.mark.timeout(900)
def test_a_run_whose_processes_are_killed_ends_as_if_nothing_was(
    tmp_path: Path, calm: Path, chance: random.Random
) -> None:
    """One of generation, one of training, and a node, the head or the driver."""
    kinds = [chance.choice(KINDS[:2]), chance.choice(KINDS[2:4]), chance.choice(KINDS[4:])]
    ends_as_if_nothing_was(tmp_path, calm, kinds, chance)


@pytest.mark.skipif("CHAOS_S" not in os.environ, reason="make chaos sets how many seconds it may take")
@pytest.mark.timeout(0)
def test_random_kills_one_run_after_another(tmp_path: Path, calm: Path, chance: random.Random) -> None:
    """The kinds in turn, three to a run."""
    deadline, kinds, runs = time.monotonic() + float(os.environ["CHAOS_S"]), [], 0
    while time.monotonic() < deadline:
        if len(kinds) < 3:
            kinds += chance.sample(KINDS, len(KINDS))
        ends_as_if_nothing_was(tmp_path, calm, kinds[:3], chance)
        del kinds[:3]
        shutil.rmtree(tmp_path / "run")
        runs += 1
    print(f"{runs} runs ended as if nothing was")
