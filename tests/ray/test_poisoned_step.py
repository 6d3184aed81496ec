"""A step of training that makes the loss of one of two real workers NaN, each time that it comes."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
import torch.distributed as dist

from spin_ray.errors import StageError
from spin_ray.learner import losses
from spin_ray.learner import step as loop
from spin_ray.loop.stages.training import stage as training
from spin_ray.loop.stages.training import worker
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.ray.test_backends_on_ray import log_of, run_with
from tests.support.heard_of import wait_until_heard_of

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _poisoned(attempts: Path, job: TrainJob) -> Any:
    """The real work, but for the loss of rank 1 in the last step."""
    right_plan, right_step = loop.plan, loop.train_step
    last: list[Any] = []

    def plan(*arguments: Any, **options: Any) -> Any:
        epochs = right_plan(*arguments, **options)
        last.append(epochs[-1][-1])
        return epochs

    def step(backend: Any, step: Any, *rest: Any) -> dict[str, float]:
        bad = dist.get_rank() == 1 and step is last[0]
        if bad:
            wait_until_heard_of(Path(job.storage.where(f"{job.name}/checkpoints")), 2)
        poison = torch.nan if bad else 1.0
        # By way of the module: a table that is pickled with this function would be a copy.
        losses.LOSSES["logistic"] = losses.MarginLoss(lambda margin: losses.logistic(margin) * poison)
        return right_step(backend, step, *rest)

    worker.plan, worker.train_step = plan, step
    with (attempts / f"rank-{dist.get_rank()}").open("a") as file:
        file.write("began\n")
    return worker.work(job)


def pairs_of_the_last_step(run: RunDir) -> set[str]:
    (table,) = run.pairs(0).tables()
    train = run.config().train
    shape = loop.PackShape(pack_length=train.pack_length, global_batch_pairs=train.global_batch_pairs, pad_id=0)
    ((*_, last),) = loop.plan(loop.pair_lengths([table]), shape, epochs=1, seed=run.config().seed)
    return {table["pair_id"][row].as_py() for pack in last.packs for tree in pack for row in tree}


def test_training_stops_before_the_step_tries_again_from_the_checkpoint_and_then_names_the_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 and 1 are in a checkpoint, and one retry is allowed. Without the poison the same command does step 2."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "work", partial(_poisoned, tmp_path))
        with pytest.raises(StageError, match=r"not finite; .*the pairs of this step: ") as raised:
            run_with(out, max_failures=1)
    named = str(raised.value).partition("the pairs of this step: ")[2].partition(";")[0].split(", ")
    assert len(named) == 4 and set(named) == pairs_of_the_last_step(RunDir(Storage(out)))
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["began\nbegan\n"] * 2
    before = log_of(RunDir(Storage(out)), 0)
    assert [line["step"] for line in before] == [0, 1]
    after = log_of(run_with(out, max_failures=1), 0)
    assert after[:2] == before and [line["step"] for line in after] == [0, 1, 2]
