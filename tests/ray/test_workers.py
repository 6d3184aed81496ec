"""A group of train workers on a real local Ray: results come back, and so do errors."""

import gc
import logging
import sys
import time
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
import torch
import torch.distributed as dist
from ray.experimental.internal_kv import _internal_kv_list

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ClusterConfig
from spin_ray.errors import ConfigError, HealthError, RunDirError, StageError
from spin_ray.runtime.connect import connect, is_embedded
from spin_ray.runtime.garbage import _AS_USUAL
from spin_ray.runtime.workers import run_workers
from tests.support.killable_cluster import KillableCluster

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

CONFIG = SpinConfig.model_validate(
    {
        "model": {"path": "-"},
        "data": {"train": "-"},
        "train": {"workers": 2, "max_failures": 0, "resources": {"cpus": 0.5}},
    }
)


def _sum_of_ranks(folder: Path) -> None:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    (folder / f"rank-{dist.get_rank()}").write_text(f"{total.item()} {torch.get_num_threads()} {gc.get_threshold()}")
    dist.barrier()
    if dist.get_rank() == 1:
        raise RunDirError("checkpoint: was written by 3 workers; restore train.workers")


def test_workers_share_a_process_group_and_a_user_error_comes_back_as_itself(tmp_path: Path) -> None:
    """Ranks 0 and 1 add 1 + 2 = 3, each with one thread, garbage as usual; then rank 1 names something to mend."""
    with pytest.raises(RunDirError, match="was written by 3 workers"):
        run_workers(_sum_of_ranks, tmp_path, CONFIG, "sum", tmp_path / "checkpoints")
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == [f"3 1 {_AS_USUAL}"] * 2


def test_a_second_run_of_a_process_cannot_ask_for_another_ray() -> None:
    """The Ray of this folder is embedded and has two CPUs."""
    assert is_embedded()
    for cluster, told in (({"address": "auto"}, "of its own at 127.0.0.1"), ({"local_cpus": 3}, "one with 2 at 127")):
        with pytest.raises(ConfigError, match=told):
            connect(CONFIG.model_copy(update={"cluster": ClusterConfig.model_validate(cluster)}))
    connect(CONFIG)


def _runs_away(folder: Path) -> None:
    with (folder / f"calls-{dist.get_rank()}").open("a") as file:
        file.write("called\n")
    raise HealthError("stopped after step 7: the margin is 99")


def test_a_run_that_runs_away_is_not_tried_again(tmp_path: Path) -> None:
    config = CONFIG.with_train(max_failures=2)
    with pytest.raises(HealthError, match="the margin is 99"):
        run_workers(_runs_away, tmp_path, config, "away", tmp_path / "checkpoints")
    assert [(tmp_path / f"calls-{rank}").read_text() for rank in (0, 1)] == ["called\n", "called\n"]
    assert len(KillableCluster.processes("controller")) == 1, "the process of controllers is kept"


def _finds_a_full_disk(folder: Path) -> None:
    with (folder / f"calls-{dist.get_rank()}").open("a") as file:
        file.write("called\n")
    if dist.get_rank() == 0:
        raise StageError("iter_000/model: could not be written (No space left on device)")
    dist.barrier()


def test_an_error_with_a_cure_is_said_at_once_though_others_wait(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"max_failures": 2})})
    with pytest.raises(StageError, match=r"^iter_000/model: could not be written \(No space left on device\)$"):
        run_workers(_finds_a_full_disk, tmp_path, config, "full", tmp_path / "checkpoints")
    assert [(tmp_path / f"calls-{rank}").read_text() for rank in (0, 1)] == ["called\n", "called\n"]


@ray.remote(num_cpus=0)
def _threshold() -> tuple[int, int, int]:
    return gc.get_threshold()


def test_a_new_process_searches_for_cycles_rarely() -> None:
    assert ray.get(_threshold.remote()) == (100_000, 50, 10)


def _fails_twice(folder: Path) -> str:
    mine = folder / f"calls-{dist.get_rank()}"
    calls = mine.read_text().splitlines() if mine.exists() else []
    mine.write_text("".join(f"{line}\n" for line in [*calls, "called"]))
    dist.barrier()
    if len(calls) < 2:
        raise RuntimeError(f"the card fell off the bus\nattempt {len(calls)}")
    return "done"


def test_each_restart_of_workers_is_told_with_its_cause(tmp_path: Path) -> None:
    told: list[str] = []
    config = CONFIG.with_train(max_failures=2, workers=1)
    found = run_workers(_fails_twice, tmp_path, config, "twice", tmp_path / "checkpoints", warn=told.append)
    assert found == "done"
    assert told == [
        f"train workers failed (RuntimeError: the card fell off the bus); restart {number} of 2" for number in (1, 2)
    ]
    assert not _internal_kv_list("spin-ray-mailbox"), "nothing is left behind"


def _fails_otherwise(folder: Path) -> None:
    first = not (folder / "failed").exists()
    dist.barrier()
    (folder / "failed").touch()
    raise ValueError("no batch has these columns") if first else KeyError("optimizer")


def test_the_last_error_names_the_first_cause_too_if_it_was_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.with_train(max_failures=1, workers=1)
    with pytest.raises(StageError, match=r"failed: KeyError: 'optimizer'; first failure: ValueError: no batch has the"):
        run_workers(_fails_otherwise, tmp_path, config, "otherwise", tmp_path / "checkpoints")
    assert "train workers failed (ValueError: no batch has these columns); restart 1 of 1" in caplog.text


def _warns(folder: Path) -> None:
    logger = logging.getLogger("spin_ray.learner")
    logger.info("nothing of note")
    for _ in range(2):
        logger.warning("%s in %s", "slow", dist.get_rank())
    if dist.get_rank() == 0:
        deadline = time.monotonic() + 30
        while not (folder / "heard").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (folder / "heard").exists()
    dist.barrier()


def test_warnings_of_a_nodes_first_worker_reach_the_driver_while_it_works(tmp_path: Path) -> None:
    """The driver looks every 2 s, as often as for a stall."""
    config, told = CONFIG.with_train(stall_timeout_s=8), []

    def hear(text: str) -> None:
        told.append(text)
        (tmp_path / "heard").touch()

    run_workers(_warns, tmp_path, config, "warns", tmp_path / "checkpoints", progress=time.time, warn=hear)
    assert told == ["slow in 0"]
