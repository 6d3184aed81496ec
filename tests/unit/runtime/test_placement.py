"""Whether the stages of a run find room, told from what the cluster says it has."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data._internal.cluster_autoscaler.fake_autoscaling_coordinator import FakeAutoscalingCoordinator
from ray.data._internal.cluster_autoscaler.rate_based_cluster_autoscaler import RateBasedClusterAutoscaler
from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil

from spin_ray.errors import ResourceError
from spin_ray.runtime import autoscaler, placement
from spin_ray.runtime.placement import check_fits, demands, room_for
from tests.support.fakes import config_of

H100 = {"ray.io/accelerator-type": "H100"}


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
        ([{"GPU": 0.3}] * 6, [{"GPU": 2}], True),
        ([{"GPU": 0.3}] * 10, [{"GPU": 3}], False),  # parts of several GPUs make no engine
        ([{"GPU": 0.7}] * 4, [{"GPU": 3}], False),
        ([{"CPU": 0.6}] * 6, [{"CPU": 3.5}], False),
    ],
)
def test_bundles_fit_when_each_finds_a_node_with_room_for_all_of_it(bundles, nodes, fits):
    assert placement.placeable(bundles, nodes) is fits


@given(st.integers(1, 300), st.integers(1, 64), st.lists(st.integers(0, 16), max_size=5))
def test_equal_bundles_fit_exactly_as_often_as_whole_ones_go_into_the_nodes(hundredths, count, node_cpus):
    """Exact arithmetic: the sum over the nodes of ⌊node / bundle⌋."""
    room = sum(Fraction(cpus) // Fraction(hundredths, 100) for cpus in node_cpus)
    nodes = [{"CPU": float(cpus)} for cpus in node_cpus]
    assert placement.placeable([{"CPU": hundredths / 100}] * count, nodes) is (count <= room)


def test_placing_does_not_use_up_the_nodes_that_were_told():
    nodes = [{"CPU": 2.0}]
    placement.placeable([{"CPU": 1}], nodes)
    assert nodes == [{"CPU": 2.0}]


def test_each_stage_asks_for_one_bundle_per_actor():
    config = config_of(
        generation={"replicas": 3, "resources": {"cpus": 2, "gpus": 1}}, train={"workers": 2, "resources": {"cpus": 4}}
    )
    assert demands(config) == {"generation": [{"CPU": 2, "GPU": 1}] * 3, "train": [{"CPU": 4}] * 2}


def test_an_engine_over_nodes_asks_for_each_group_of_its_pipeline_within_a_node(cluster):
    """Two groups of 4 GPUs: two nodes of 4 have room, one of 4 has not, nor have four nodes of 2."""
    engine = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    config = config_of(generation={"resources": {"cpus": 2, "gpus": 8}, "engine": engine})
    assert demands(config)["generation"] == [{"CPU": 2, "GPU": 4}, {"GPU": 4}]
    cluster["nodes"] = [{"CPU": 8.0, "GPU": 4.0}] * 2
    check_fits(config)
    for nodes in ([{"CPU": 8.0, "GPU": 4.0}], [{"CPU": 8.0, "GPU": 2.0}] * 4):
        cluster["nodes"] = nodes
        with pytest.raises(ResourceError, match="generation asks for 2 × 2 CPU, 4 GPU"):
            check_fits(config)


@pytest.mark.parametrize(
    ("bundles", "nodes", "lack"),
    [
        ([{"GPU": 8}] * 2, [{"GPU": 8}] * 2, None),
        ([{"GPU": 8}], [{"GPU": 4}] * 4, "no node has 8 GPU, the most is 4"),
        ([{"GPU": 4}], [], "no node has 4 GPU, the most is 0"),
        ([{"CPU": 4, "GPU": 1}], [{"CPU": 8}, {"CPU": 2, "GPU": 8}], "no node has 4 CPU, 1 GPU together"),
        ([{"CPU": 2, "GPU": 8}] * 5, [{"CPU": 64, "GPU": 8}] * 3, "there is room for 3, 4 CPU, 16 GPU is missing"),
        ([{"GPU": 5}] * 4, [{"GPU": 8}] * 3, "there is room for 3, 5 GPU is missing"),  # 24 ≥ 20, and yet
    ],
)
def test_what_is_missing_is_named(bundles, nodes, lack):
    assert placement.missing(bundles, nodes) == lack


def test_resources_of_a_placement_group_are_rays_own():
    group = "d5b932cc7b1bfd30c1c90ac9132c01000000"
    own = {f"CPU_group_0_{group}": 1.0, f"bundle_group_{group}": 999.9, "node:127.0.0.1": 1.0}
    assert placement.shown({"CPU": 2.0, "my_group_a": 1.0, **own}) == "2 CPU, 1 my_group_a"


def test_a_judge_is_asked_for_too():
    config = config_of(algorithm="sppo", scorer={"path": "judge", "replicas": 2}, generation={"samples_per_prompt": 2})
    assert demands(config)["scorer"] == [{"CPU": 1}] * 2
    config = config_of(
        algorithm="sppo", scorer={"kind": "grade", "path": "exact"}, generation={"samples_per_prompt": 2}
    )
    assert "scorer" not in demands(config), "a grader is no actor"


def test_a_stage_that_could_never_be_placed_is_an_error_with_request_remedy_and_cluster(cluster):
    cluster["nodes"] = [{"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0}, {"CPU": 1.0}]
    with pytest.raises(ResourceError) as caught:
        check_fits(config_of(train={"workers": 4}))
    assert str(caught.value) == (
        "train asks for 4 × 1 CPU (train.workers, train.resources), but the cluster has: 2 CPU; 1 CPU; "
        "train: there is room for 3, 1 CPU is missing; lower the request or add nodes"
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
    with room_for(config):
        assert len(cluster["nodes"]) == 3
        assert cluster["asked"] == [[({"CPU": 1}, {})] * 6] * 3
    assert cluster["asked"][3:] == [[]], "withdrawn, as Ray would keep the nodes up for ever"


def test_nodes_that_are_there_are_asked_for_too_as_they_would_be_given_back(cluster):
    with room_for(config_of(cluster={"wait_for_nodes_s": 60})):
        assert cluster["asked"] == [[({"CPU": 1}, {})]]
    cluster["asked"].clear()
    with room_for(config_of()):
        pass
    assert cluster["asked"] == [], "no autoscaler is waited for"


def test_a_request_is_renewed_as_ray_forgets_it_when_the_driver_is_gone(cluster, monkeypatch):
    monkeypatch.setattr(autoscaler, "RENEW_S", 0.01)
    with room_for(config_of(cluster={"wait_for_nodes_s": 60})):
        deadline = time.monotonic() + 60
        while len(cluster["asked"]) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert cluster["asked"][:3] == [[({"CPU": 1}, {})]] * 3 and cluster["asked"][-1] == []
    made = len(cluster["asked"])
    time.sleep(0.1)
    assert len(cluster["asked"]) == made


def test_ray_data_asks_for_no_nodes_however_busy_the_cluster_is():
    """Its sum with the run's request may be more than the cluster can have, and then no request counts."""
    autoscaler.keep_ray_data_from_asking()
    coordinator = FakeAutoscalingCoordinator()
    made = RateBasedClusterAutoscaler([], "x", utility_calculator=None, autoscaling_coordinator=coordinator)
    assert made._is_cluster_utilization_low(ClusterUtil(1, 1, 1, 1))


def test_an_autoscaler_that_cannot_be_asked_ends_no_run(cluster, monkeypatch, caplog):
    def fail(_: autoscaler.Request) -> None:
        raise RuntimeError("no coordinator")

    monkeypatch.setattr(autoscaler, "send", fail)
    with room_for(config_of(cluster={"wait_for_nodes_s": 60})):
        pass
    assert "the autoscaler could not be asked for nodes: no coordinator" in caplog.text


@pytest.mark.slow
def test_a_request_is_withdrawn_when_the_wait_or_the_run_fails(cluster, monkeypatch):
    config = config_of(train={"workers": 3}, cluster={"wait_for_nodes_s": 0.05})
    with pytest.raises(ResourceError, match="train asks for 3"), room_for(config):
        pass
    assert cluster["asked"][-1] == []
    cluster["asked"].clear()
    monkeypatch.setattr(time, "sleep", lambda _: cluster["nodes"].append({"CPU": 2.0}))
    with pytest.raises(ZeroDivisionError), room_for(config):
        raise ZeroDivisionError
    assert cluster["asked"] == [*[[({"CPU": 1}, {})] * 3] * 2, []]


@pytest.mark.parametrize(
    ("stages", "wanted", "request_"),
    [
        # One node of 8 for the engine; 8 of the 16 workers use it afterwards.
        ({"generation": [{"CPU": 1, "GPU": 8}], "train": [{"CPU": 4, "GPU": 1}] * 16}, {},
         [({"CPU": 1, "GPU": 8}, {})] + [({"CPU": 4, "GPU": 1}, {})] * 8),
        # Engines of one GPU each: training comes first, as its bundles are larger.
        ({"generation": [{"CPU": 1, "GPU": 1}] * 4, "train": [{"CPU": 8, "GPU": 1}] * 2}, {},
         [({"CPU": 8, "GPU": 1}, {})] * 2 + [({"CPU": 1, "GPU": 1}, {})] * 2),
        # A node has 1 of its mark, and an engine's bundle 0.001 for all workers that use its GPUs.
        ({"generation": [{"GPU": 8, "H100": 0.001}], "train": [{"CPU": 4, "GPU": 1, "H100": 0.001}] * 8}, {},
         [({"GPU": 8, "H100": 0.001}, {})]),
        ({"generation": [{"GPU": 8, "H100": 0.001}], "train": [{"GPU": 1, "A100": 0.001}]}, {},
         [({"GPU": 8, "H100": 0.001}, {}), ({"GPU": 1, "A100": 0.001}, {})]),
        ({"generation": [{"CPU": 2}], "train": [{"CPU": 1}] * 3}, {}, [({"CPU": 2}, {}), ({"CPU": 1}, {})]),
        # Nodes of any kind do for training; a stage that wants H100 gets no other's.
        ({"generation": [{"GPU": 1}], "train": [{"GPU": 1}] * 2}, {"generation": H100},
         [({"GPU": 1}, H100), ({"GPU": 1}, {})]),
        ({"generation": [{"GPU": 1}], "train": [{"GPU": 1}]}, {"generation": H100, "train": {"pool": "b"}},
         [({"GPU": 1}, H100), ({"GPU": 1}, {"pool": "b"})]),
    ],
)  # fmt: skip
def test_every_stage_is_asked_for_and_no_gpu_twice(stages, wanted, request_):
    labels = {stage: wanted.get(stage, {}) for stage in stages}
    assert placement.request_for(stages, labels, exact=False) == request_


def test_cpus_are_asked_for_once_the_gpus_are_there_without_them(cluster, monkeypatch):
    """A node of 8 GPUs and 16 CPUs came for the engine: 4 of the 8 workers find CPUs there."""
    gpus = {"CPU": 16.0, "GPU": 8.0}
    monkeypatch.setattr(time, "sleep", lambda _: cluster["nodes"].append(gpus))
    config = config_of(
        generation={"resources": {"gpus": 8}, "engine": {"tensor_parallel_size": 8}},
        train={"workers": 8, "resources": {"cpus": 4, "gpus": 1}},
        cluster={"wait_for_nodes_s": 60},
    )
    engine, worker = ({"CPU": 1, "GPU": 8}, {}), ({"CPU": 4, "GPU": 1}, {})
    with room_for(config):
        assert cluster["asked"] == [[engine], *[[engine, *[worker] * 8]] * 2]


GPU_8, GPU_1 = ({"CPU": 1, "GPU": 8}, {}), ({"CPU": 4, "GPU": 1}, {})


@pytest.mark.parametrize(
    ("request_", "bundles", "labels", "rest"),
    [
        # Nodes for one engine of 8 and for 8 of 16 workers: the workers take all, the engine leaves 8.
        ([GPU_8, *[GPU_1] * 8], [{"CPU": 4, "GPU": 1}] * 16, {}, []),
        ([GPU_8, *[GPU_1] * 8], [{"CPU": 1, "GPU": 8}], {}, [GPU_1] * 8),
        # Engines of fewer CPUs than workers have the workers' GPUs.
        ([GPU_1] * 8, [{"CPU": 1, "GPU": 1}] * 8, {}, []),
        ([({"CPU": 2}, {}), ({"CPU": 1}, {})], [{"CPU": 1}] * 3, {}, []),
        ([({"GPU": 1}, H100), ({"GPU": 1}, {"pool": "b"})], [{"GPU": 1}], {"pool": "b"}, [({"GPU": 1}, H100)]),
    ],
)
def test_what_ray_train_asks_for_is_left_out(request_, bundles, labels, rest):
    assert placement.beyond(request_, bundles, labels) == rest


def idle(told, gpus, free=None, **sections):
    told["nodes"] = [{"CPU": 64.0, "GPU": 8.0}] * (gpus // 8)
    told["free"] = {"GPU": gpus if free is None else free}
    eight = {
        "generation": {"replicas": 8, "min_replicas": 2, "resources": {"gpus": 1}},
        "train": {"workers": 8, "resources": {"gpus": 1}},
    }
    return config_of(**{name: eight.get(name, {}) | sections.get(name, {}) for name in {*eight, *sections}})


def test_gpus_that_no_stage_uses_are_told(cluster, caplog):
    with room_for(idle(cluster, 16)):
        pass
    assert caplog.messages == [
        "the cluster has 16 GPUs; generation uses 8, train uses 8; the others stay idle (generation.replicas, "
        "train.workers)"
    ]
    assert "16 GPUs, 12 of them free; generation uses 8" in (placement.idle_gpus(idle(cluster, 16, free=12)) or "")


@pytest.mark.parametrize(
    ("gpus", "changes"),
    [
        (8, {}),
        (16, {"train": {"workers": 16}}),
        (16, {"free": 8}),  # the others are another job's
        (16, {"cluster": {"wait_for_nodes_s": 60}}),  # an autoscaler gives them back
        (16, {"generation": {"resources": {"gpus": 1, "labels": {"pool": "a"}}}}),
        (16, {"generation": {"resources": {}}, "train": {"resources": {}}}),
    ],
)
def test_gpus_of_others_and_those_that_go_by_themselves_are_not(cluster, caplog, gpus, changes):
    with room_for(idle(cluster, gpus, **changes)):
        pass
    assert not caplog.messages


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({}, True), ({"pool": "a"}, True), ({"pool": "b"}, False), ({"pool": "!a"}, False), ({"pool": "!b"}, True),
        ({"pool": "in(b, a)"}, True), ({"pool": "!in(b, a)"}, False), ({"pool": "in(b,c)"}, False),
        ({"zone": "x"}, False), ({"zone": "!x"}, True), ({"pool": "a", "zone": "x"}, False),
    ],
)  # fmt: skip
def test_a_node_is_selected_by_its_labels_as_ray_does(selector, selected):
    assert placement.is_selected({"pool": "a"}, selector) is selected


def test_least_numbers_are_what_must_fit():
    config = config_of(generation={"replicas": 8, "min_replicas": 2}, train={"workers": 4, "min_workers": 1})
    assert {stage: len(bundles) for stage, bundles in demands(config).items()} == {"generation": 2, "train": 1}
