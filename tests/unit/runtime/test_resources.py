"""What the run asks of Ray, told from what the cluster says it has; no Ray is started."""

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from spin_ray.errors import ResourceError, StageError
from spin_ray.runtime import resources
from spin_ray.runtime.resources import check_fits, demands, wait_until_free, while_it_moves, with_deadline
from tests.support.fakes import config_of


@pytest.fixture
def cluster(monkeypatch):
    """Nodes and free resources, as Ray would tell them; a test changes both."""
    told: dict[str, Any] = {"nodes": [{"CPU": 2.0}], "free": {"CPU": 2.0}, "asked": []}
    monkeypatch.setattr(resources, "_node_resources", lambda labels=None: told["nodes"])
    monkeypatch.setattr(ray, "available_resources", lambda: told["free"])
    monkeypatch.setattr(resources, "_ask_autoscaler", told["asked"].append)
    return told


# Placing


@pytest.mark.parametrize(
    ("bundles", "nodes", "fits"),
    [
        ([{"CPU": 1}] * 2, [{"CPU": 2}], True),
        ([{"CPU": 1}] * 3, [{"CPU": 2}], False),
        ([{"CPU": 2}], [{"CPU": 1}, {"CPU": 1}], False),  # a worker is on one node
        ([{"CPU": 2}] * 2, [{"CPU": 3}, {"CPU": 3}], True),
        ([{"CPU": 2}] * 3, [{"CPU": 3}, {"CPU": 3}], False),  # 6 CPUs in all, and 1 left over on each node
        ([{"CPU": 1, "GPU": 1}] * 4, [{"CPU": 8, "GPU": 2}] * 2, True),
        ([{"CPU": 1, "GPU": 1}], [{"CPU": 8}, {"GPU": 1}], False),  # both on the same node
        ([{"GPU": 4}], [{"CPU": 8, "GPU": 2}] * 2, False),  # tensor parallelism stays within a node
        ([{"CPU": 1, "accelerator_type:H100": 0.001}], [{"CPU": 8, "accelerator_type:A100": 1}], False),
        ([{"CPU": 1}], [], False),
        ([], [], True),
        ([{"CPU": 0.6}] * 5, [{"CPU": 3}], True),  # 3 − 0.6 − … falls 2e-16 short
        ([{"GPU": 0.05}] * 20, [{"GPU": 1}], True),
        ([{"CPU": 0.6}] * 6, [{"CPU": 3.5}], False),
    ],
)
def test_bundles_fit_when_each_finds_a_node_with_room_for_all_of_it(bundles, nodes, fits):
    assert resources._placeable(bundles, nodes) is fits


@given(st.integers(1, 300), st.integers(1, 64), st.lists(st.integers(0, 16), max_size=5))
def test_equal_bundles_fit_exactly_as_often_as_whole_ones_go_into_the_nodes(hundredths, count, node_cpus):
    """Exact arithmetic: the sum over the nodes of ⌊node / bundle⌋."""
    room = sum(Fraction(cpus) // Fraction(hundredths, 100) for cpus in node_cpus)
    nodes = [{"CPU": float(cpus)} for cpus in node_cpus]
    assert resources._placeable([{"CPU": hundredths / 100}] * count, nodes) is (count <= room)


def test_placing_does_not_use_up_the_nodes_that_were_told():
    nodes = [{"CPU": 2.0}]
    resources._placeable([{"CPU": 1}], nodes)
    assert nodes == [{"CPU": 2.0}]


def test_each_stage_asks_for_one_bundle_per_actor():
    config = config_of(
        generation={"replicas": 3, "resources": {"cpus": 2, "gpus": 1}}, train={"workers": 2, "resources": {"cpus": 4}}
    )
    assert demands(config) == {"generation": [{"CPU": 2, "GPU": 1}] * 3, "train": [{"CPU": 4}] * 2}


def test_a_judge_is_asked_for_too():
    config = config_of(algorithm="sppo", scorer={"path": "judge", "replicas": 2}, generation={"samples_per_prompt": 2})
    assert demands(config)["scorer"] == [{"CPU": 1}] * 2


def test_a_stage_that_could_never_be_placed_is_an_error_with_request_remedy_and_cluster(cluster):
    cluster["nodes"] = [{"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0}, {"CPU": 1.0}]
    with pytest.raises(ResourceError) as caught:
        check_fits(config_of(train={"workers": 4}))
    assert str(caught.value) == (
        "train asks for 4 × 1 CPU (train.workers, train.resources), but the cluster has: 2 CPU; 1 CPU; "
        "lower the request or add nodes"
    )
    assert cluster["asked"] == []


def test_all_stages_that_do_not_fit_are_in_one_error(cluster):
    config = config_of(generation={"replicas": 3}, train={"workers": 4})
    with pytest.raises(ResourceError, match=r"generation asks for 3 × 1 CPU .* and train asks for 4 × 1 CPU"):
        check_fits(config)


def test_stages_follow_one_another_and_may_use_the_same_cpus(cluster):
    check_fits(config_of(generation={"replicas": 2}, train={"workers": 2}))


def test_a_growing_cluster_is_waited_for_and_asked_to_grow(cluster, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: cluster["nodes"].append({"CPU": 2.0}))
    config = config_of(train={"workers": 6}, cluster={"wait_for_nodes_s": 60})
    check_fits(config)
    assert len(cluster["nodes"]) == 3
    assert cluster["asked"] == [config, config]


# Waiting


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


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({}, True), ({"pool": "a"}, True), ({"pool": "b"}, False), ({"pool": "!a"}, False), ({"pool": "!b"}, True),
        ({"pool": "in(b, a)"}, True), ({"pool": "!in(b, a)"}, False), ({"pool": "in(b,c)"}, False),
        ({"zone": "x"}, False), ({"zone": "!x"}, True), ({"pool": "a", "zone": "x"}, False),
    ],
)  # fmt: skip
def test_a_node_is_selected_by_its_labels_as_ray_does(selector, selected):
    assert resources.is_selected({"pool": "a"}, selector) is selected


def test_least_numbers_are_what_must_fit():
    config = config_of(generation={"replicas": 8, "min_replicas": 2}, train={"workers": 4, "min_workers": 1})
    assert {stage: len(bundles) for stage, bundles in demands(config).items()} == {"generation": 2, "train": 1}


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
