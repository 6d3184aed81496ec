"""Waiting for Ray ends: with what was waited for, or with an error that says what was missing."""

import threading
import time
from collections.abc import Iterator

import pytest

from spin_ray.errors import StageError
from spin_ray.runtime.placement import room_for
from spin_ray.runtime.waiting import wait_until_free, while_it_moves, with_deadline
from tests.support.fakes import config_of


def test_waiting_ends_when_the_last_stage_let_go(cluster, monkeypatch):
    cluster["free"], cluster["nodes"] = {"CPU": 0.5}, [{"CPU": 7.0}]
    monkeypatch.setattr(time, "sleep", lambda _: cluster["free"].update(CPU=7.0))
    config = config_of(train={"workers": 10, "resources": {"cpus": 0.7}})  # 0.7 · 10 is 7 but for rounding
    wait_until_free(config, "train", "the train workers")
    assert cluster["free"] == {"CPU": 7.0}


def test_what_is_never_let_go_is_an_error_that_says_what_was_waited_for(cluster):
    cluster["free"] = {"CPU": 1.0, "object_store_memory": 5.0}
    config = config_of(train={"workers": 2, "start_timeout_s": 0.01}, cluster={"wait_for_nodes_s": 60})
    with pytest.raises(StageError, match=r"the workers: waited 0 s for 2 CPU to be free; .* 1 CPU of them free$"):
        wait_until_free(config, "train", "the workers")
    assert cluster["asked"] == [], "there is room for it once the others have let go"


WORKER = {"CPU": 8.0, "GPU": 1.0}
ON_GPUS = {
    "generation": {"replicas": 2, "resources": {"gpus": 1}},
    "train": {"workers": 2, "start_timeout_s": 10, "resources": {"gpus": 1}},
}


def test_a_node_that_was_lost_between_two_stages_is_asked_for_and_waited_for_as_at_the_start(cluster, monkeypatch):
    """The new node comes after 100 s, ten times what workers may take to start."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 100:
            cluster.update(nodes=[WORKER] * 2, free={"CPU": 16.0, "GPU": 2.0})

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    cluster.update(nodes=[WORKER] * 2)
    with room_for(config := config_of(**ON_GPUS, cluster={"wait_for_nodes_s": 3600})):
        cluster.update(nodes=[WORKER], free=WORKER)
        wait_until_free(config, "train", "the train workers")
        assert len(cluster["nodes"]) == 2
        assert cluster["asked"][-1] == [({"CPU": 1, "GPU": 1}, {})] * 2, "and kept until the run ends"
    assert cluster["asked"][-1] == []


def test_nodes_that_do_not_come_back_are_an_error_that_says_what_is_missing(cluster, monkeypatch):
    naps = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: naps(0.05))
    cluster.update(nodes=[WORKER], free=WORKER)
    train = ON_GPUS["train"] | {"start_timeout_s": 0.01}
    lack = r"there is room for 1, 1 CPU, 1 GPU is missing"
    with pytest.raises(StageError, match=rf"waited 0 s for 2 CPU, 2 GPU .*; {lack}$"):
        wait_until_free(config_of(train=train, cluster={"wait_for_nodes_s": 0.02}), "train", "the train workers")
    assert cluster["asked"][0] == [({"CPU": 1, "GPU": 1}, {})] * 2
    assert cluster["asked"][-1] == [], "withdrawn, as no run is around it"
    cluster["asked"].clear()
    with pytest.raises(StageError, match=rf"{lack} \(an autoscaler is asked only with cluster\.wait_for_nodes_s\)"):
        wait_until_free(config_of(train=train), "train", "the train workers")
    assert cluster["asked"] == []


def test_rows_pass_through_in_order(cluster):
    assert list(with_deadline(iter([1, None, 3]), 10, 10, "a row")) == [1, None, 3]
    assert list(with_deadline([], 10, 10, "a row")) == []


def test_an_error_of_the_source_comes_through_after_its_rows(cluster):
    def rows() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    passed = with_deadline(rows(), 10, 10, "a row")
    assert next(passed) == 1
    with pytest.raises(KeyError, match="lost"):
        next(passed)


@pytest.mark.parametrize(("before", "limits", "waited"), [(0, (0.05, 60), "0"), (1, (60, 0.05), "0")])
def test_rows_that_do_not_come_are_an_error_after_the_limit_for_the_first_or_for_the_next(
    cluster, before, limits, waited
):
    stuck = threading.Event()

    def rows() -> Iterator[int]:
        yield from range(before)
        stuck.wait(60)

    passed = with_deadline(rows(), *limits, "a generation shard")
    assert [next(passed) for _ in range(before)] == list(range(before))
    with pytest.raises(StageError, match=f"waited {waited} s for a generation shard; the cluster has 2 CPU in 1 nodes"):
        next(passed)
    stuck.set()


def test_work_that_moves_may_take_long_and_work_that_stands_still_is_given_up(cluster) -> None:
    """0.6 s of work is longer than the limit of 0.2 s, but something changes at every look."""
    looks = iter(range(1000))

    def work() -> str:
        time.sleep(0.6)
        return "done"

    assert while_it_moves(work, lambda: next(looks), 0.2, "a step") == "done"
    stuck = threading.Event()
    with pytest.raises(
        StageError, match=r"waited 0 s for a step; the cluster has 2 CPU in 1 nodes, 2 CPU of them free"
    ):
        while_it_moves(lambda: stuck.wait(60), lambda: 0, 0.1, "a step")
    stuck.set()


def test_what_the_work_raises_comes_back(cluster) -> None:
    with pytest.raises(ValueError, match="mine"):
        while_it_moves(lambda: int("mine"), lambda: 0, 60, "a step")
