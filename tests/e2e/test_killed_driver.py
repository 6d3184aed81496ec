"""kill -9 of the driver at random moments: the same command finishes the run, with the result it would have had."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.program import ROOT, SPIN_RAY, environment, micro_recipe, spin_ray, write_recipe

pytestmark = pytest.mark.e2e

STEPS = 36
"""48 pairs × 3 epochs / 4."""


def digests(run: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.glob(pattern))
    }


def kill_when(recipe: Path, out: Path, moment: Callable[[], bool], what: str) -> None:
    """Starts the run and kills its driver with SIGKILL once ``moment`` is there."""
    driver = subprocess.Popen(
        [*SPIN_RAY, "run", str(recipe), "--out", str(out)],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    try:
        while not moment():
            assert driver.poll() is None, f"the run ended before {what}"
            assert time.monotonic() < deadline, f"waited 300 s for {what}"
            time.sleep(0.05)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    finished = spin_ray("run", write_recipe(folder, micro_recipe()), "--out", folder / "run")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "run"


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "iter_000" / "train_log.jsonl").read_text().splitlines()]


def test_an_undisturbed_run_publishes_its_iterate(calm: Path) -> None:
    """The smallest whole run."""
    assert (calm / "LATEST").read_text() == "iter_000\n"
    assert steps_of(calm) == list(range(STEPS))
    assert digests(calm, "iter_000/model/*.safetensors")


def test_a_killed_driver_loses_nothing_that_was_committed(tmp_path: Path, calm: Path) -> None:
    """Killed in generation, scoring and training. Shards keep their bytes, and the final weights are bitwise those
    of a run that nobody disturbed (fp32, one thread), which also shows that one seed gives one result.
    """
    recipe, rough = write_recipe(tmp_path, micro_recipe()), tmp_path / "rough"
    generations, log = rough / "iter_000" / "generations", rough / "iter_000" / "train_log.jsonl"
    some = random.Random(os.getpid()).randint(1, 2)
    kill_when(recipe, rough, lambda: len(list(generations.glob("part-*"))) >= some, f"{some} shards")
    assert not (generations / "_MANIFEST.json").exists()
    committed = digests(rough, "iter_000/generations/part-*")
    assert committed

    kill_when(recipe, rough, (rough / "iter_000" / "pairs" / "_MANIFEST.json").exists, "pairs, before reference scores")
    assert committed.items() <= digests(rough, "iter_000/generations/part-*").items()

    kill_when(recipe, rough, lambda: log.exists() and len(log.read_text().splitlines()) >= 6, "6 training steps")
    reference = digests(rough, "iter_000/reference/*")
    assert reference

    finished = spin_ray("run", recipe, "--out", rough)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert digests(rough, "iter_000/reference/*") == reference, "a moved policy must never score the reference again"
    for pattern in (
        "prompts/part-*",
        "iter_000/generations/part-*",
        "iter_000/pairs/part-*",
        "iter_000/model/*.safetensors",
    ):
        assert digests(rough, pattern) == digests(calm, pattern), pattern
    assert steps_of(rough) == list(range(STEPS)), "each is logged once"


def test_one_driver_at_a_time_and_sigterm_gives_the_run_back_within_the_grace_time(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    """A second driver is refused while the first runs.

    `ray job stop` and a pod's end send SIGTERM, and Ray kills what is left after 3 s: by then the lease must be free,
    and a driver on any machine can go on at once. Caught while engines start, with Ray up.
    """
    recipe, out = write_recipe(tmp_path, micro_recipe()), tmp_path / "run"
    driver = subprocess.Popen(
        [*SPIN_RAY, "run", str(recipe), "--out", str(out)],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (out / "run.json").exists():
            assert time.monotonic() < deadline, "waited 300 s for the first driver to begin"
            time.sleep(0.1)
        code, _, refused = call("run", recipe, "--out", out)
        assert code == 2
        assert f"in use by process {driver.pid} on" in refused

        deadline = time.monotonic() + 300
        while not (out / "prompts" / "_MANIFEST.json").exists():
            assert driver.poll() is None and time.monotonic() < deadline, "waited 300 s for the prompts"
            time.sleep(0.1)
        lease = out / "lease.json"
        assert lease.exists()
        driver.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 3
        while lease.exists():
            assert time.monotonic() < deadline, "the lease was not free after 3 s"
            time.sleep(0.05)
        _, error = driver.communicate(timeout=60)
        assert driver.returncode == 1
        assert "stopped; the same command goes on from what is committed" in error
    finally:
        driver.kill()
        driver.wait(timeout=30)
