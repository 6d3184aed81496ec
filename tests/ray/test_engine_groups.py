"""Engines on GPUs, on a node that only says that it has some: Ray counts GPUs without looking for them."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle

from spin_ray.errors import StageError
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.connect import keep_to_loopback
from spin_ray.runtime.engine import EngineSpec
from tests.ray.test_stages_on_ray import make_config, make_prompts, play
from tests.support.fakes import FakeEngine, seed_engine

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module

_ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """One node that says that it has two GPUs; Ray counts them without looking."""
    ray.shutdown()
    keep_to_loopback(True)
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def _fails_once(spec: EngineSpec, once: Path) -> FakeEngine:
    def fail(call: int) -> None:
        with once.open("a") as log:
            log.write(f"{os.getpid()}\n")
        if len(once.read_text().split()) == 2:
            raise RuntimeError(_ILLEGAL)

    return FakeEngine(short=True, before=fail)


def _always_fails(spec: EngineSpec) -> FakeEngine:
    def fail(call: int) -> None:
        raise RuntimeError(f"{_ILLEGAL}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")

    return FakeEngine(short=True, before=fail)


def _fails_and_then_does_not_load(spec: EngineSpec, once: Path) -> FakeEngine:
    if once.exists():
        raise ValueError("No available memory for the cache blocks")
    once.touch()
    return _always_fails(spec)


def _notes_its_group(spec: EngineSpec, note: Path) -> FakeEngine:
    group = ray.util.get_current_placement_group()
    placed: Any = ray.util.placement_group_table(group)
    note.write_text(json.dumps([len(set(placed["bundles_to_node_id"].values())), group.bundle_specs]))
    return FakeEngine(short=True)


def test_an_actor_whose_engine_fails_on_a_gpu_is_another_process_afterwards_and_gives_the_same_shards(
    tmp_path: Path,
) -> None:
    log, shards = tmp_path / "processes", {}
    for name, engine in (("calm", seed_engine), ("rough", lambda spec: _fails_once(spec, log))):
        run = RunDir(Storage(tmp_path / name))
        config = make_config(generation={"resources": {"cpus": 0.5, "gpus": 1}})
        make_prompts(run, config)
        play(run, config, engine)
        shards[name] = run.generations(0).manifest().files
    assert shards["rough"] == shards["calm"]
    processes = log.read_text().split()
    assert processes[0] == processes[1] and len(set(processes)) == 2 and processes[0] not in processes[2:]
    lost = [event for event in run.events() if event["event"] == "lost"]
    assert [(event["shards"], event["why"]) for event in lost] == [(1, f"an engine died ({_ILLEGAL})")]


def test_an_engine_that_fails_on_a_gpu_again_and_again_is_told_by_its_own_error(tmp_path: Path) -> None:
    """Its process has ended, of which Ray only says that it died."""
    run, config = RunDir(Storage(tmp_path)), make_config(generation={"resources": {"cpus": 0.5, "gpus": 1}})
    make_prompts(run, config)
    with pytest.raises(StageError, match=f"^generation failed: {_ILLEGAL}; committed shards are kept"):
        play(run, config, _always_fails)


def test_an_engine_that_does_not_load_again_is_told_before_the_failure_of_the_one_before(tmp_path: Path) -> None:
    run, config = RunDir(Storage(tmp_path)), make_config(generation={"resources": {"cpus": 0.5, "gpus": 1}})
    make_prompts(run, config)
    told = rf"^generation failed: ValueError: No available memory .* \(an engine before it: {_ILLEGAL}\); committed"
    with pytest.raises(StageError, match=told):
        play(run, config, lambda spec: _fails_and_then_does_not_load(spec, tmp_path / "once"))


def test_an_engine_of_a_pipeline_lies_in_a_group_of_its_own_that_the_stage_removes(tmp_path: Path) -> None:
    run, note = RunDir(Storage(tmp_path / "run")), tmp_path / "note"
    config = make_config(generation={"resources": {"cpus": 0.5, "gpus": 2}, "engine": {"pipeline_parallel_size": 2}})
    make_prompts(run, config)
    play(run, config, lambda spec: _notes_its_group(spec, note))
    assert json.loads(note.read_text()) == [1, [{"CPU": 0.5, "GPU": 1.0}, {"GPU": 1.0}]]
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}
