"""Waiting for Ray ends: with what was waited for, or with an error that says what was missing."""

import threading
import time
from collections.abc import Iterator

import pytest

from spin_ray.errors import StageError
from spin_ray.runtime.waiting import wait_until_free, while_it_moves, with_deadline


def test_waiting_ends_when_the_last_stage_let_go(cluster, monkeypatch):
    cluster["free"] = {"CPU": 0.5}
    monkeypatch.setattr(time, "sleep", lambda _: cluster["free"].update(CPU=7.0))
    wait_until_free([{"CPU": 0.7}] * 10, timeout_s=60, stage="train")  # 0.7 · 10 is 7 but for rounding
    assert cluster["free"] == {"CPU": 7.0}


def test_what_is_never_let_go_is_an_error_that_says_what_was_waited_for(cluster):
    cluster["free"] = {"CPU": 1.0, "object_store_memory": 5.0}
    with pytest.raises(StageError, match=r"train: waited 0 s for 1 CPU, 1 GPU to be free; .* 1 CPU of them free"):
        wait_until_free([{"CPU": 1, "GPU": 1}], timeout_s=0, stage="train")


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
    with pytest.raises(
        StageError, match=r"waited 0 s for a step; the cluster has 2 CPU in 1 nodes, 2 CPU of them free"
    ):
        while_it_moves(work, lambda: 0, 0.1, "a step")


def test_what_the_work_raises_comes_back(cluster) -> None:
    with pytest.raises(ValueError, match="mine"):
        while_it_moves(lambda: int("mine"), lambda: 0, 60, "a step")
