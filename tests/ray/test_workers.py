"""A group of train workers on a real local Ray: results come back, and so do errors."""

import gc
import sys
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
import torch
import torch.distributed as dist

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
