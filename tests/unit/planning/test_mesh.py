"""Which mesh ``train.mesh: auto`` stands for, why, and what is refused before anything runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig, Mesh
from spin_ray.errors import ConfigError, ModelError, ResourceError
from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.planning import run_cost
from spin_ray.planning.cluster import Cluster, devices_of
from spin_ray.planning.hardware import GB
from spin_ray.planning.mesh import (
    Choice,
    Placing,
    check_mesh,
    choose_mesh,
    memory_of,
    mesh_of,
    too_long,
)
from spin_ray.planning.model_shape import MISTRAL_7B, ModelShape
from tests.support.fakes import config_of
from tests.support.planning_cases import LLAMA_70B, MISTRAL, SPIN, ZEPHYR


def choice(nodes: int, shape: ModelShape | None = MISTRAL_7B, each: int = 8, room: float = 80, **train) -> Choice:
    config = ZEPHYR.with_train(workers=nodes * each, **train)
    return choose_mesh(config, shape, Placing(node_of_rank=tuple(np.repeat(range(nodes), each)), room=room * GB))


def test_one_node_shares_one_copy():
    found = choice(1)
    assert found.mesh == Mesh(shard=8)
    assert str(found) == (
        "train.mesh: {replicate: 1, shard: 8, tensor: 1}: the 8 workers are on one node and share one copy of the "
        "weights"
    )


def test_several_nodes_hold_a_copy_each_where_it_fits():
    """7B takes 4 weights + 4 gradients + 4 squares = 12 bytes a parameter: 87 GB, so 11 GB on each of eight.

    70B takes 847 GB, so 106 GB on each of eight, and 40 more beside; cards of 220 may be filled up to 165.
    """
    small, large = choice(2), choice(4, LLAMA_70B)
    assert (small.mesh, large.mesh) == (Mesh(replicate=2, shard=8), Mesh(shard=32))
    assert "fits" in small.reason and "only gradients cross the network" in small.reason
    assert "would not surely fit" in large.reason and "a device of 80" in large.reason
    assert choice(4, LLAMA_70B, room=220).mesh == Mesh(replicate=4, shard=8)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [((0,) * 8 + (1,) * 4, "unequal numbers of workers (8, 4)"), ((0, 1) * 4, "no neighbours in rank")],
)
def test_uneven_or_scattered_workers_share_one_copy(nodes, reason):
    placing = Placing(node_of_rank=nodes, room=80 * GB)
    found = choose_mesh(ZEPHYR.with_train(workers=len(nodes)), MISTRAL_7B, placing)
    assert found.mesh == Mesh(shard=len(nodes)) and reason in found.reason


def test_layers_are_split_only_where_pairs_or_memory_are_short():
    """64 pairs are enough for 64 workers and too few for 128; 2 pairs and 8 workers need groups of four."""
    assert choice(8).mesh.tensor == 1
    assert choice(16).mesh == Mesh(replicate=16, shard=4, tensor=2)
    few = choice(1, global_batch_pairs=2)
    assert few.mesh == Mesh(shard=2, tensor=4)
    assert few.reason == "a step's 2 pairs are too few for 8 workers, so 4 workers split each layer"
    long = choice(1, room=31.5, pack_length=30_000)
    assert long.mesh.tensor > 1 and "so 2 workers split each layer" in long.reason
    split = replace(MISTRAL_7B, heads=16, kv_heads=4, intermediate=7168)
    assert MISTRAL_7B.split(2) == split and split.layer_matmuls == MISTRAL_7B.layer_matmuls / 2
    packs = ZEPHYR.with_train(workers=8, pack_length=30_000)
    whole, halved = (memory_of(packs, MISTRAL_7B, mesh, 31.5 * GB) for mesh in (Mesh(shard=8), Mesh(shard=4, tensor=2)))
    assert halved <= 31.5 * GB < whole
    assert choice(1, replace(MISTRAL_7B, kv_heads=1), global_batch_pairs=2).mesh.tensor == 1
    assert choice(1, global_batch_pairs=2, lora=LoraConfig()).mesh.tensor == 1
    assert choice(1, global_batch_pairs=2, compile=True).mesh.tensor == 1
    cpus = ZEPHYR.train.resources.model_copy(update={"gpus": 0})
    assert choice(1, global_batch_pairs=2, resources=cpus).mesh.tensor == 1


def test_what_is_not_known_or_not_ours_stays_flat():
    assert choice(2, None).mesh == Mesh(shard=16)
    assert choice(2, backend="deepspeed").mesh == Mesh(shard=16)


def test_the_plan_names_the_mesh_of_its_cluster():
    config = ZEPHYR.with_train(workers=16)
    devices = devices_of(config, Cluster(nodes=2, gpu="H100-80G"))
    assert run_cost.planned_mesh(config, MISTRAL_7B, devices).mesh == Mesh(replicate=2, shard=8)


SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "splits"),
    [
        ("mistral", True), ("qwen3", True), ("phi3", True), ("mixtral", False), ("qwen3_moe", False),
        ("gpt_oss", False), ("gpt_neox", False), ("granite_swa", False),
    ],
)  # fmt: skip
def test_the_plan_chooses_the_mesh_of_the_run(tmp_path, kind, splits):
    """Both ask transformers' tensor plan, by the model's config.json."""
    config, folder = ZEPHYR.with_train(workers=16, global_batch_pairs=2), saved_config(tmp_path, kind)
    cluster = Cluster(nodes=2, gpu="A100-40G")
    shape, devices = ModelShape.from_folder(folder), devices_of(config, cluster)
    planned = run_cost.planned_mesh(config, shape, devices)
    assert planned == mesh_of(config, folder, (0,) * 8 + (1,) * 8, devices.train.memory)
    assert (planned.mesh.tensor > 1) is splits
    given = config.with_train(mesh=Mesh(shard=8, tensor=2))
    if splits:
        assert run_cost.planned_mesh(given, shape, devices).mesh.tensor == 2
    else:
        with pytest.raises(ModelError, match=r"train\.mesh\.tensor: transformers.* plan for a model of type"):
            run_cost.planned_mesh(given, shape, devices)


def saved_config(folder: Path, kind: str) -> Path:
    AutoConfig.for_model(kind, **SIZES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("tensor", "divides"), [(2, True), (8, True), (3, False), (16, False)])
def test_a_model_known_by_name_is_split_as_its_config_json(tmp_path, tensor, divides):
    """Zephyr's sizes are known without a folder."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    folder = ModelShape.from_folder(tmp_path)
    assert folder == MISTRAL_7B and MISTRAL_7B.why_not_split(tensor) == folder.why_not_split(tensor)
    assert (MISTRAL_7B.why_not_split(tensor) is None) is divides


def test_an_explicit_mesh_is_taken_or_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    two, four = (0, 0), (0, 0, 1, 1)
    given = ZEPHYR.with_train(mesh=Mesh(replicate=2, tensor=2))
    assert mesh_of(given, tmp_path, four, 80 * GB).mesh == Mesh(replicate=2, tensor=2)
    with pytest.raises(ConfigError, match=r"tensor: 2} is for 4 workers and there are 2; change its sizes or use"):
        mesh_of(given, tmp_path, two, 80 * GB)
    with pytest.raises(ResourceError, match=r"neighbours, but the ranks are on nodes \[0, 1, 0, 1\]"):
        mesh_of(given, tmp_path, (0, 1, 0, 1), 80 * GB)
    with pytest.raises(ModelError, match="16 does not divide the model's 8 key and value heads; give another size"):
        check_mesh(ZEPHYR.with_train(mesh=Mesh(tensor=16)), tmp_path, None, SPIN)
    check_mesh(given, tmp_path, 80 * GB, SPIN)


@pytest.mark.parametrize(
    ("train", "sft", "needed", "cure"),
    [
        ({}, False, 87, "start from an SFT model .no sft. and train adapters"),
        ({"lora": LoraConfig()}, True, 116, "start from an SFT model"),
        ({"lora": LoraConfig()}, False, None, ""),
    ],
)
def test_what_offloading_takes_of_a_machine_is_known_at_the_start(tmp_path, train, sft, needed, cure):
    """Three fp32 numbers a weight with RMSProp, four with the warm-up's AdamW. The system killed it, late."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    sections = {"sft": {}} if sft else {}
    config = SpinConfig.model_validate(ZEPHYR.model_dump() | {"sft": None} | sections).with_train(offload=True, **train)
    check_mesh(config, tmp_path, 80 * GB, SPIN, memory=120 * GB)
    check_mesh(config, tmp_path, 80 * GB, SPIN)
    if needed is None:
        check_mesh(config, tmp_path, 80 * GB, SPIN, memory=64 * GB)
        return
    with pytest.raises(ResourceError, match=rf"^train\.offload: .* take {needed} GB .*, which has 64; {cure}"):
        check_mesh(config, tmp_path, 80 * GB, SPIN, memory=64 * GB)


def test_prompts_too_long_for_any_mesh_are_refused_with_the_length_that_would_fit():
    """Weights and states do not count: more workers would make them small."""
    config = ZEPHYR.model_copy(update={"model": ZEPHYR.model.model_copy(update={"max_length": 400_000})})
    assert too_long(ZEPHYR, MISTRAL_7B, 80 * GB, SPIN) is None
    found = too_long(config, MISTRAL_7B, 80 * GB, SPIN)
    assert found is not None and "a context-parallel mesh would be needed, which spin_ray does not have" in found
    fits = int(found.rpartition("lower model.max_length to ")[2].split()[0])
    for length, refused in ((fits, False), (fits + 1, True)):
        model = config.model.model_copy(update={"max_length": length})
        assert bool(too_long(config.model_copy(update={"model": model}), MISTRAL_7B, 80 * GB, SPIN)) is refused


def test_a_model_that_fills_a_card_at_any_length_is_named_in_place_of_a_length():
    """70B: embedding and head of 2.1B take 4 GB in bf16 and 17 GB in two buffers of fp32, on cards of 24 GB."""
    found = too_long(ZEPHYR, LLAMA_70B, 24 * GB, SPIN)
    assert found is not None and "23 GB of them are needed at any length, for embedding, head" in found
    assert found.endswith("take GPUs with more memory, or train adapters (train.lora: {rank: 16})")
    adapters = ZEPHYR.with_train(lora=LoraConfig())
    assert too_long(adapters, LLAMA_70B, 24 * GB, SPIN) is None
    longer = ZEPHYR.model_copy(update={"model": ZEPHYR.model.model_copy(update={"max_length": 32_768})})
    assert str(too_long(longer, LLAMA_70B, 24 * GB, SPIN)).endswith("take GPUs with more memory")
    assert "lower model.max_length" in str(too_long(longer, LLAMA_70B, 40 * GB, SPIN))
    wide = replace(LLAMA_70B, vocab=1_000_000)
    assert "take GPUs with more memory" in str(too_long(ZEPHYR, wide, 24 * GB, SPIN)), "not even a token fits"


@pytest.mark.parametrize("algorithm", ["dpo", "tspin"])
def test_the_length_that_would_fit_is_that_of_the_algorithms_own_responses(algorithm):
    """DPO's responses are rows of the data; T-SPIN has one more."""
    config = config_of(
        model={"path": "x", "max_length": 300_000},
        algorithm=algorithm,
        iterations=2,
        generation={"sampling": {"max_tokens": 1000}},
        train={"pack_length": 900_000},
    )
    own = find_algorithm(algorithm)
    found = too_long(config, MISTRAL_7B, 80 * GB, own)
    assert found is not None and f"up to {own.least_pack(config)} tokens" in found
    most = int(found.partition("; from ")[2].split()[0]) - 1
    lowered = int(found.rpartition("lower model.max_length to ")[2].split()[0])
    fitting, longer = (
        own.least_pack(config.model_copy(update={"model": config.model.model_copy(update={"max_length": length})}))
        for length in (lowered, lowered + 1)
    )
    assert fitting <= most < longer


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (
            {"mesh": {"shard": 2, "tensor": 2}, "compile": True},
            r"train\.compile: layers that are split .* leave it out",
        ),
        ({"mesh": {"shard": 2}}, r"train\.mesh: {replicate: 1, shard: 2, tensor: 1} has 2 ranks for train\.workers 4"),
        ({"mesh": {"shard": 4}, "backend": "deepspeed"}, r"train\.mesh: is for train\.backend: fsdp2"),
        ({"mesh": {"shard": 4}, "min_workers": 2}, r"train\.mesh: has fixed sizes"),
        ({"mesh": {"shard": 2, "tensor": 2}, "lora": {}}, r"train\.mesh\.tensor: layers with adapters"),
    ],
)
def test_impossible_meshes_are_refused_in_the_recipe(train, problem):
    assert config_of(train={"workers": 4, "mesh": {"replicate": 2, "shard": 2}}).train.mesh == Mesh(
        replicate=2, shard=2
    )
    with pytest.raises(ValueError, match=problem):
        config_of(train={"workers": 4, **train})
