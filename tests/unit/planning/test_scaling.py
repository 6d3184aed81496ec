"""More nodes: what they save, and from which batch on."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.cluster import Cluster
from spin_ray.planning.model_shape import MISTRAL_7B
from spin_ray.planning.scaling import scaling_of
from spin_ray.planning.tables import scaling_table
from tests.support.paths import RECIPES
from tests.support.planning_cases import LLAMA_70B, PAPER_WORK, SPIN, ZEPHYR

CONFIG = ZEPHYR.with_train(precision="bf16")


@pytest.fixture(scope="module")
def scaling():
    return scaling_of(CONFIG, MISTRAL_7B, Cluster(nodes=8, gpu="H100"), PAPER_WORK, SPIN)


def test_more_nodes_never_take_longer_with_the_batch_that_the_plan_names(scaling):
    hours = [size.hours for size in scaling.with_enough]
    assert hours == sorted(hours, reverse=True) and [size.nodes for size in scaling.with_enough] == [1, 2, 4, 8]


def test_a_batch_that_is_too_small_for_the_nodes_is_said(scaling):
    """64 pairs of two opponents are 32 trees: 64 GPUs have packs for half of them."""
    assert not scaling.scales and scaling.advised.nodes < 8
    assert scaling.advised.hours <= min(size.hours for size in scaling.with_own_batch) * 1.05
    said = " ".join(scaling.sentences())
    assert "a batch of 64 pairs is too small for 8" in said
    assert f"--train.global_batch_pairs={scaling.batch}" in said


def test_two_nodes_with_the_batch_that_is_named_take_0_6_of_one_and_with_the_papers_no_longer(scaling):
    """On nodes of 8 adapters of 400 Gb/s."""
    two = scaling_of(CONFIG, MISTRAL_7B, Cluster(nodes=2, gpu="H100"), PAPER_WORK, SPIN)
    one = two.with_own_batch[0].hours
    assert two.with_enough[-1].hours <= 0.6 * one and two.with_own_batch[-1].hours <= one


def test_a_batch_that_one_node_cannot_hold_has_no_hours_there():
    """Several packs of a rank without a sum after each need whole gradients, 29 GB of a card's 24."""
    config = CONFIG.with_train(reduce_every_pack=False, global_batch_pairs=8)
    found = scaling_of(config, MISTRAL_7B, Cluster(nodes=2, gpu="RTX-4090"), PAPER_WORK, SPIN)
    assert [size.nodes for size in found.with_own_batch] == [1, 2]
    assert [size.nodes for size in found.with_enough] == [2] and not found.scales
    console = Console(width=200, file=StringIO())
    console.print(scaling_table(found))
    one, two = [line.split("│") for line in console.file.getvalue().splitlines() if "shard" in line]
    assert one[4].strip() == "–" and float(two[4]) == pytest.approx(found.with_enough[0].hours, abs=0.01)


def with_engines_of(gpus: float, tensor: int = 1, pipeline: int = 1) -> SpinConfig:
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    engine = CONFIG.generation.engine.model_copy(update=sizes)
    resources = CONFIG.generation.resources.model_copy(update={"gpus": gpus})
    generation = CONFIG.generation.model_copy(update={"engine": engine, "resources": resources})
    return CONFIG.model_copy(update={"generation": generation})


@pytest.mark.parametrize(
    ("gpus", "tensor", "pipeline", "engines"),
    [
        (0.1, 1, 1, [80, 160]), (0.2, 1, 1, [40, 80]), (0.3, 1, 1, [24, 48]), (0.7, 1, 1, [8, 16]),
        (5, 5, 1, [1, 2]), (8, 4, 2, [1, 2]), (16, 8, 2, [1]),
    ],
)  # fmt: skip
def test_all_gpus_hold_as_many_engines_as_whole_groups_fit_on_nodes(gpus, tensor, pipeline, engines):
    """Ten engines of 0.1, three of 0.3 or one of 0.7 share a GPU; one of 16 GPUs needs two nodes."""
    config = with_engines_of(gpus, tensor, pipeline)
    found = scaling_of(config, MISTRAL_7B, Cluster(nodes=2, gpu="H100"), PAPER_WORK, SPIN)
    assert [size.replicas for size in found.with_own_batch] == engines


def test_70b_takes_at_most_30_hours_on_four_nodes_and_no_longer_on_eight():
    """No node of 8 H100 holds 12 bytes for each of 70.6B parameters: one copy is over all."""
    config = with_engines_of(4, tensor=4)
    four, eight = scaling_of(config, LLAMA_70B, Cluster(nodes=8, gpu="H100"), PAPER_WORK, SPIN).with_own_batch
    assert (four.nodes, four.mesh) == (4, "{replicate: 1, shard: 32, tensor: 1}")
    assert eight.hours <= four.hours <= 30


def test_a_slow_network_keeps_replicas_apart_and_costs_less_than_one_flat_mesh():
    """100 Gb/s a node: a flat mesh gathers every layer over it, replicas sum gradients once a step."""
    slow = Cluster(nodes=2, gpu="H100", network=100)
    hybrid = scaling_of(CONFIG, MISTRAL_7B, slow, PAPER_WORK, SPIN).with_own_batch[-1]
    assert hybrid.mesh == "{replicate: 2, shard: 8, tensor: 1}"
    fast = scaling_of(CONFIG, MISTRAL_7B, replace(slow, network=3200), PAPER_WORK, SPIN).with_own_batch[-1]
    assert hybrid.hours > fast.hours


def test_the_command_says_mesh_reason_and_nodes(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    words = [
        "plan", RECIPES / "zephyr_7b.yaml", "--gpu", "H100", "--nodes", "2", "--prompt-tokens", "130",
        "--response-tokens", "256", "--network", "400", "--train.workers=16", "--generation.replicas=16",
    ]  # fmt: skip
    code, out, error = call(*words)
    assert (code, error) == (0, "")
    assert "train.mesh: {replicate: 2, shard: 8, tensor: 1}: a copy over the 8 workers of a node fits" in out
    assert "Network: 400 Gb/s of a node, all adapters together, one direction (given)" in out
    found = json.loads(call(*words, "--json")[1])
    assert found["mesh"] == {"replicate": 2, "shard": 8, "tensor": 1, "why": found["mesh"]["why"]}
    assert found["scaling"]["advised"]["nodes"] in (1, 2)
    assert any(stage["sent"].get("replicas") for phase in found["phases"] for stage in phase["stages"])


def test_a_recipes_own_mesh_is_planned_as_it_is(call):
    words = ["plan", RECIPES / "zephyr_7b.yaml", "--gpu", "H100", "--nodes", "2", "--prompt-tokens", "130",
             "--response-tokens", "256", "--train.workers=16", "--generation.replicas=16"]  # fmt: skip
    seconds = [
        json.loads(call(*words, "--network=50", f"--train.mesh={mesh}", "--json")[1])["seconds"]
        for mesh in ("{replicate: 2, shard: 8}", "{shard: 16}", "{shard: 2, tensor: 8}")
    ]
    assert seconds[0] < seconds[1], "over 50 Gb/s a flat mesh takes longer"
    assert all(seconds)
