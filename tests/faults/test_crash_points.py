"""A run is cut down at each point where it changes its folder, in each way; the same call then ends as if nothing was.

The small run has POINTS points. Here each is hit by one of the faults in turn; `make chaos` takes random ones, for as
long as it is told.
"""

import itertools
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import ATTEMPTS, Storage, table_from_bytes
from tests.support import small_run
from tests.support.faulty_disk import FAULTS, FaultyDisk, Killed
from tests.support.small_run import BAD_ROWS, HELDOUT_ROWS, ROWS, STEPS, committed

POINTS = 247
"""Changes of the folder in one small run; a test says when this is no longer so."""


def cut_down(config: SpinConfig, out: Path, at: int, fault: str) -> FaultyDisk:
    """Runs until the fault; what it raises must be written for the reader."""
    disk = FaultyDisk(at, fault)
    if fault.startswith("killed"):
        with pytest.raises(Killed):
            small_run.run(config, out, disk)
    else:
        with pytest.raises(StageError, match=r"could not be written .*run the command again"):
            small_run.run(config, out, disk)
    return disk


def test_the_small_run_has_so_many_points(tmp_path: Path, config: SpinConfig) -> None:
    disk = FaultyDisk()
    small_run.run(config, tmp_path / "run", disk)
    assert len(disk.points) == POINTS, "correct POINTS, so that the sweep reaches the last one"


def assert_ends_as_if_nothing_was(config: SpinConfig, out: Path, calm: Path) -> None:
    kept, expected = committed(out), committed(calm)
    assert kept.items() <= expected.items(), "what counts is never something else than the undisturbed run has"
    for orphan in (out / ATTEMPTS).rglob("*"):
        if orphan.is_file():
            orphan.unlink()  # it may be a second name of a committed file
            orphan.write_bytes(b"an orphan: nobody may read this")
    small_run.run(config, out)
    assert committed(out) == expected, "rows, weights and manifests are bitwise those of the undisturbed run"
    for name in ("LATEST", "quarantine/prompts.parquet", "quarantine/heldout.parquet", "iter_000/eval.json"):
        assert (out / name).read_bytes() == (calm / name).read_bytes(), name
    assert steps_logged(out) == steps_logged(calm)
    commits = Counter(event["stage"] for event in RunDir(Storage(out)).events() if event["event"] == "commit")
    assert max(commits.values()) == 1, "no stage is committed twice"
    assert not any((out / ATTEMPTS).iterdir())


def steps_logged(out: Path) -> list[dict[str, object]]:
    log = read_json_lines(Storage(out), "iter_000/train_log.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log]


@pytest.mark.parametrize("at", range(POINTS))
def test_a_run_that_was_cut_down_ends_as_if_nothing_was(
    tmp_path: Path, config: SpinConfig, calm: Path, at: int
) -> None:
    cut_down(config, tmp_path / "run", at, FAULTS[at % len(FAULTS)])
    assert_ends_as_if_nothing_was(config, tmp_path / "run", calm)


def test_the_undisturbed_run_accounts_for_every_row(calm: Path, config: SpinConfig) -> None:
    """14 rows: 12 prompts, a malformed and a repeated one; each prompt is answered, paired and scored once."""
    run = RunDir(Storage(calm))

    def ids(path: str, column: str) -> list[str]:
        return [value for table in run.artefact(path).tables() for value in table[column].to_pylist()]

    prompts = ids("prompts", "prompt_id")
    assert len(prompts) == len(set(prompts)) == ROWS
    assert table_from_bytes(run.storage.read("quarantine/prompts.parquet")).num_rows == BAD_ROWS
    assert ids("iter_000/generations", "prompt_id") == prompts
    assert [pair.partition("/")[0] for pair in ids("iter_000/pairs", "pair_id")] == prompts
    assert sorted(ids("iter_000/reference", "pair_id")) == sorted(ids("iter_000/pairs", "pair_id"))
    assert len(ids("iter_000/heldout_samples", "prompt_id")) == HELDOUT_ROWS
    assert [line["step"] for line in steps_logged(calm)] == list(range(STEPS))


@pytest.mark.slow
def test_a_process_that_really_ends_at_a_point_leaves_what_the_sweep_assumes(
    tmp_path: Path, config: SpinConfig, calm: Path
) -> None:
    """A fork that leaves by ``os._exit`` in the link of the pairs' manifest: no ``finally`` runs, no buffer is
    flushed.
    """
    disk = FaultyDisk()
    small_run.run(config, tmp_path / "counted", disk)
    at = next(i for i, point in enumerate(disk.points) if point.endswith("iter_000/pairs/_MANIFEST.json"))
    for fault in ("killed", "killed after the effect"):
        out = tmp_path / fault
        child = os.fork()
        if child == 0:
            small_run.run(config, out, FaultyDisk(at, fault, die=lambda: os._exit(9)))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert any((out / ATTEMPTS).iterdir()), "the attempt is left behind, as nobody cleaned up"
        assert (out / "iter_000/pairs/_MANIFEST.json").exists() == (fault != "killed")
        assert_ends_as_if_nothing_was(config, out, calm)


@pytest.mark.skipif("CHAOS_S" not in os.environ, reason="make chaos sets how many seconds it may take")
@pytest.mark.timeout(0)
def test_random_faults_one_after_another(tmp_path: Path, config: SpinConfig, calm: Path) -> None:
    """Every point with every fault, in an order that the seed decides; then runs that are cut down two or three times
    before they are left alone.
    """
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 2**32)
    chance, deadline, injected = random.Random(seed), time.monotonic() + float(os.environ["CHAOS_S"]), Counter()
    print(f"\nCHAOS_SEED={seed}", flush=True)
    sweep = [[case] for case in itertools.product(range(POINTS), FAULTS)]
    chance.shuffle(sweep)
    several = (
        [(chance.randrange(POINTS), chance.choice(FAULTS)) for _ in "ab" + "c" * n] for n in itertools.cycle((0, 1))
    )
    runs = 0
    for cuts in itertools.chain(sweep, several):
        if time.monotonic() > deadline:
            break
        out = tmp_path / "run"
        for at, fault in cuts:
            try:
                small_run.run(config, out, FaultyDisk(at, fault))
            except (Killed, StageError):
                injected[fault] += 1
        try:
            assert_ends_as_if_nothing_was(config, out, calm)
        except BaseException:
            print(f"run {runs} did not, cut down at {cuts}")
            raise
        shutil.rmtree(out)
        runs += 1
    print(
        f"{runs} runs ended as if nothing was (all {len(sweep)} single faults: {runs >= len(sweep)}); {dict(injected)}"
    )
