"""Whoever asks Ray for a process says all of it: labels, custom resources, threads and how often it may be restarted.

A recorder stands in for Ray, which would tell none of this; tests/ray has the real one.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ScorerConfig
from spin_ray.errors import StageError
from spin_ray.loop.algorithms.sppo import preferences
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.report import benchmarks
from spin_ray.runtime import workers
from tests.support.fakes import config_of

ASKED = {"cpus": 2, "gpus": 1, "custom": {"rack": 0.5}, "labels": {"pool": "a"}}
EXPECTED = {
    "num_cpus": 2, "num_gpus": 1, "resources": {"rack": 0.5}, "label_selector": {"pool": "a"},
    "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> dict[str, Any]:
    """The keywords of the last request to Ray."""
    told: dict[str, Any] = {}

    def keep(*_: Any, **options: Any) -> SimpleNamespace:
        told.update(options)
        return SimpleNamespace(iter_rows=list, remote=lambda *_: object())

    monkeypatch.setattr(ray.data, "from_items", lambda items, **_: SimpleNamespace(map=keep))
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: SimpleNamespace(options=keep))
    monkeypatch.setattr(ray, "get", lambda found: {})
    monkeypatch.setattr(ray, "wait", lambda running, timeout: (running[:1], running[1:]))
    monkeypatch.setattr(benchmarks, "connect", lambda config: None)
    for module in (generation, preferences):
        monkeypatch.setattr(module, "wait_until_free", lambda *_: None)
    monkeypatch.setattr(benchmarks, "wait_for_a_task", lambda *_: None)
    return told


def sppo_of(**sections: Any) -> SpinConfig:
    """A run of SPPO, which has every kind of actor."""
    return config_of(
        algorithm="sppo", scorer={"path": "judge", "replicas": 4, "resources": sections.pop("scorer", {})},
        generation={"replicas": 2, "samples_per_prompt": 2, **sections.pop("generation", {})}, **sections,
    )  # fmt: skip


def by_training(config: SpinConfig) -> None:
    workers.run_workers(lambda job: None, None, config, "name", "folder")


def by_generation(config: SpinConfig) -> None:
    list(generation._play(cast(Any, ["a shard"] * 3), config, cast(Any, None), cast(Any, None)))


def by_preferences(config: SpinConfig) -> None:
    job: Any = SimpleNamespace(scorer=config.scorer)
    list(preferences._compare(job, ["a part"] * 3, config))


def by_lm_eval(config: SpinConfig) -> None:
    unused: Any = None
    list(benchmarks._measure_on_ray(unused, 1, benchmarks.Request(model="m", name="sft", benchmarks=()), config))


@pytest.mark.parametrize(("ask", "limit"), [
    (by_generation, {"max_restarts": 5}), (by_preferences, {"max_restarts": 5}), (by_lm_eval, {"max_retries": 0}),
])  # fmt: skip
def test_labels_resources_threads_and_a_limit_to_restarts_reach_ray(asked, ask, limit):
    config = sppo_of(generation={"resources": ASKED, "max_failures": 5}, scorer=ASKED, train={"resources": ASKED})
    ask(config)
    assert asked == asked | EXPECTED
    restarts = asked["ray_remote_args_fn"]() if "ray_remote_args_fn" in asked else asked
    assert restarts == restarts | limit


@pytest.mark.parametrize("ask", [by_generation, by_preferences])
def test_a_process_that_dies_while_it_loads_is_tried_as_often(asked, ask):
    ask(sppo_of(generation={"max_failures": 7}))
    assert ray.data.DataContext.get_current().max_consecutive_actor_init_deaths == 7


@pytest.mark.parametrize(
    ("module", "stage", "ask"),
    [
        (generation, "generation", by_generation),
        (preferences, "scorer", by_preferences),
        (workers, "train", by_training),
    ],
)
def test_a_stage_waits_for_its_own_resources_before_it_asks_for_processes(asked, monkeypatch, module, stage, ask):
    waited: list[Any] = []

    def taken(config: SpinConfig, stage: str, what: str) -> None:
        waited.append((config, stage))
        raise StageError("taken")

    monkeypatch.setattr(module, "wait_until_free", taken)
    config = sppo_of(train={"workers": 3})
    with pytest.raises(StageError, match="taken"):
        ask(config)
    assert waited == [(config, stage)]
    assert asked == {}


def test_a_model_that_cannot_be_loaded_is_no_death_of_its_actor(tmp_path: Path):
    """An error from ``__init__`` would be tried again by Ray Data; one from a call ends the stage."""
    missing: Any = SimpleNamespace(here=lambda **_: tmp_path)
    job: Any = SimpleNamespace(
        scorer=ScorerConfig(path="judge"), preference_model=missing, policy=missing, variables=None
    )
    actor = preferences._Comparing(job)
    with pytest.raises(Exception, match="is no reward model"):
        _ = actor._scorer


def test_lm_eval_waits_for_room_for_one_part_and_not_longer_than_for_a_stuck_step(asked, monkeypatch):
    waited, cancelled = [], []
    monkeypatch.setattr(benchmarks, "wait_for_a_task", lambda *asked: waited.append(asked))
    monkeypatch.setattr(ray, "wait", lambda running, timeout: ([], running))
    monkeypatch.setattr(ray, "cancel", lambda task, force: cancelled.append(task))
    monkeypatch.setattr(benchmarks, "in_the_cluster", lambda: "8 CPU of 8 are taken")
    config = config_of(
        train={"workers": 4, "stall_timeout_s": 60, "start_timeout_s": 20, "resources": {"cpus": 3}},
        generation={"replicas": 1, "start_timeout_s": 30},
    )
    tasks = tuple(benchmarks.parse_benchmarks(["gsm8k", "mmlu"]))
    for backend, parts in (("hf", ["gsm8k", "mmlu"]), ("vllm", ["gsm8k,mmlu"])):
        request = benchmarks.Request(model="m", name="sft", benchmarks=tasks, backend=cast(Any, backend))
        with pytest.raises(StageError) as caught:
            list(benchmarks._measure_on_ray(cast(Any, None), 1, request, config))
        assert str(caught.value) == "; ".join(
            f"lm-eval failed on sft, --tasks {part}: waited 60 s (train.stall_timeout_s); 8 CPU of 8 are taken"
            for part in parts
        )
    assert len(cancelled) == 3
    assert waited == [
        (config.train.resources, 20, "lm-eval on sft"), (config.generation.resources, 30, "lm-eval on sft")
    ]  # fmt: skip
