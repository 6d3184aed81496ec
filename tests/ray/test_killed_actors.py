"""Processes of Ray are killed with SIGKILL in the middle of their work: it ends right without help."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import pytest
import ray.cloudpickle
import ray.train
import torch
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, StageError, UserError
from spin_ray.run_dir.artefact import FileEntry
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.engine import EngineSpec, StartEngine
from spin_ray.runtime.workers import run_workers
from tests.ray.test_stages_on_ray import make_config, make_prompts, play
from tests.support.fakes import FakeEngine, seed_engine
from tests.support.heard_of import wait_until_heard_of

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module


def _dies_at_its_second_shard(spec: EngineSpec, once: Path) -> FakeEngine:
    def die(call: int) -> None:
        if call == 2:
            _die(once)

    return FakeEngine(short=True, before=die)


def _dies_while_it_loads(spec: EngineSpec, once: Path) -> FakeEngine:
    _die(once)
    return seed_engine(spec)


def _die(once: Path) -> None:
    """Kills this process, if no process has done so before."""
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _shards(folder: Path, engine: StartEngine) -> dict[str, FileEntry]:
    run, config = RunDir(Storage(folder)), make_config()
    make_prompts(run, config)
    play(run, config, engine)
    return run.generations(0).manifest().files


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, FileEntry]]:
    """Makes shards that nothing disturbs, once; not before the test has a Ray."""
    return cache(lambda: _shards(tmp_path_factory.mktemp("calm"), seed_engine))


@pytest.mark.parametrize("dying", [_dies_at_its_second_shard, _dies_while_it_loads])
def test_a_generation_actor_that_is_killed_is_started_again_and_gives_the_same_shards(
    tmp_path: Path, dying: Callable[[EngineSpec, Path], FakeEngine], calm: Callable[[], dict[str, FileEntry]]
) -> None:
    once = tmp_path / "killed"
    rough = _shards(tmp_path / "rough", lambda spec: dying(spec, once))
    assert once.exists(), "the engine was killed"
    assert rough == calm()


@pytest.mark.parametrize(
    ("raised", "cause", "told", "text"),
    [
        (ValueError("no room for it"), None, StageError, "^generation failed: ValueError: no room for it; committed"),
        (ConfigError("a.setting: is wrong, mend it"), None, UserError, "^a.setting: is wrong, mend it$"),
        (ConfigError("a.setting: is wrong, mend it"), ImportError("b"), UserError, "^a.setting: is wrong, mend it$"),
    ],
)
def test_an_engine_that_cannot_be_loaded_is_an_error_at_once(
    tmp_path: Path, raised: Exception, cause: Exception | None, told: type[Exception], text: str
) -> None:
    """It would fail again: another process is started for one that died only."""
    tried = tmp_path / "tried"

    def refuse(spec: EngineSpec) -> FakeEngine:
        with tried.open("a") as log:
            log.write("once\n")
        raise raised from cause

    run, config = RunDir(Storage(tmp_path / "run")), make_config()
    make_prompts(run, config)
    with pytest.raises(told, match=text):
        play(run, config, refuse)
    assert tried.read_text().split() == ["once"]


def test_an_engine_that_fails_again_and_again_on_cpus_is_told_once(tmp_path: Path) -> None:
    def fail(call: int) -> None:
        raise RuntimeError("Executor failed.")

    run, config = RunDir(Storage(tmp_path / "run")), make_config()
    make_prompts(run, config)
    with pytest.raises(StageError, match=r"^generation failed: RuntimeError: Executor failed.; committed shards"):
        play(run, config, lambda spec: FakeEngine(before=fail))


def test_an_engine_that_is_killed_again_and_again_is_told_with_what_takes_less_memory(tmp_path: Path) -> None:
    run, config = RunDir(Storage(tmp_path / "run")), make_config()
    make_prompts(run, config)
    told = r"a process \(pid \d+ on \S+\) was killed by the system or crashed; if memory ran out, lower generation"
    with pytest.raises(StageError, match=f"^generation failed: {told}"):
        play(run, config, lambda spec: FakeEngine(before=lambda call: os.kill(os.getpid(), signal.SIGKILL)))


def _counts_to_four(folder: Path) -> None:
    """Four steps with a checkpoint after each. With two made, rank 1 dies at its third; with three, the controller."""
    checkpoint, first = ray.train.get_checkpoint(), 0
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            first = int((Path(saved) / "step").read_text())
    for step in range(first, 4):
        if step == 2 and dist.get_rank() == 1 and not (folder / "killed").exists():
            wait_until_heard_of(folder / "checkpoints", step)
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and dist.get_rank() == 1 and not (folder / "controller_killed").exists():
            wait_until_heard_of(folder / "checkpoints", step)
            (folder / "controller_killed").touch()
            _kill_the_controller()
        dist.all_reduce(torch.ones(1))
        with (folder / f"steps-{dist.get_rank()}").open("a") as log:
            log.write(f"{step}\n")
        saved = folder / f"saving-{dist.get_rank()}"
        saved.mkdir(exist_ok=True)
        (saved / "step").write_text(str(step + 1))
        ray.train.report({"step": step + 1}, checkpoint=ray.train.Checkpoint.from_directory(saved))


def _kill_the_controller() -> None:
    """Kills the controller, with which its workers end."""
    every = psutil.process_iter(["ppid", "cmdline"])
    of_this_node = [one for one in every if one.info["ppid"] == os.getppid() and one.info["cmdline"]]
    (controller,) = [one for one in of_this_node if "TrainControllers" in " ".join(one.info["cmdline"])]
    controller.kill()
    time.sleep(60)


def test_train_workers_and_their_controller_that_are_killed_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    config = SpinConfig.model_validate(
        {
            "model": {"path": "-"},
            "data": {"train": "-"},
            "train": {"workers": 2, "max_failures": 1, "resources": {"cpus": 1}},
        }
    )
    starts: list[int] = []
    told: list[str] = []
    run_workers(
        _counts_to_four,
        tmp_path,
        config,
        "count",
        tmp_path / "checkpoints",
        prepare=lambda: starts.append(1),
        warn=told.append,
    )
    of_workers, of_controller = told
    assert of_workers.startswith("train workers failed (") and of_workers.endswith("); restart 1 of 1")
    assert of_controller.startswith("the controller of the train workers died (") and "restart 1 of 1" in of_controller
    assert len(starts) == 2, "before each controller: the first may have been killed while it wrote its snapshot"
    assert (tmp_path / "killed").exists() and (tmp_path / "controller_killed").exists()
    for rank in (0, 1):
        assert (tmp_path / f"steps-{rank}").read_text().split() == ["0", "1", "2", "3"]
