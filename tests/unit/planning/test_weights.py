"""Bytes of the base under adapters: what is quantised, loaded and evaluated."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.learner.decoder import decoder_layers
from spin_ray.learner.loading import on_meta
from spin_ray.planning.cluster import Cluster
from spin_ray.planning.learner_cost import evaluation_cost
from spin_ray.planning.model_shape import MISTRAL_7B, ModelShape
from spin_ray.planning.plan import check_memory
from spin_ray.planning.weights import linear_weights, weights_of
from tests.support.planning_cases import A100, PAPER_WORK, SPIN, ZEPHYR, flat

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
NARROW = EXPERTS | {"moe_intermediate_size": 64}
NF4 = {"rank": 16, "base": "nf4", "merge": False}
MIXTRAL = ModelShape(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=32000, experts=8, active=2
)


def adapters(**lora: object) -> SpinConfig:
    tree = ZEPHYR.model_dump() | {"train": ZEPHYR.with_train(precision="bf16").train.model_dump() | {"lora": lora}}
    return parse_config(tree, source="test")


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("llama", {}), ("phi3", {}), ("nemotron", {}), ("mixtral", EXPERTS), ("olmoe", EXPERTS), ("gpt_oss", EXPERTS),
        ("granitemoe", EXPERTS), ("qwen3_moe", NARROW), ("qwen2_moe", NARROW | {"shared_expert_intermediate_size": 96}),
    ],
)  # fmt: skip
def test_the_quantised_weights_are_those_of_linear_layers(kind: str, experts: dict[str, int]):
    """transformers quantises each module of type Linear but the head (integrations.bitsandbytes), on the model of the
    same config.json, without memory for its weights.
    """
    config = AutoConfig.for_model(kind, **SIZES, **experts)
    shape, model = ModelShape.from_config(config.to_dict(), "config.json"), on_meta(config)
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    found = sum(module.weight.numel() for module in modules if type(module) is nn.Linear)
    gates = shape.layers * shape.hidden if kind == "qwen2_moe" else 0  # of the shared expert
    assert found == shape.layers * linear_weights(shape) + gates
    everything = sum(parameter.numel() for parameter in model.parameters())
    planned = weights_of(adapters(rank=1, base="nf4", merge=False, target_modules=["unknown"]), shape)
    assert planned.frozen == pytest.approx(2 * (everything - found), rel=0.06), "biases and some norms are not counted"


def test_a_worker_loads_a_quantised_mixture_whole_before_it_is_sharded():
    """Mixtral has 1.34B of 46.7B weights in linear layers: 91 GB on each card, also where an eighth would fit."""
    cost = evaluation_cost(adapters(**NF4), MIXTRAL, A100, PAPER_WORK, 1, flat(adapters(**NF4)))
    assert cost.memory == {"whole base while loading": pytest.approx(91.4e9, rel=1e-3), "runtime": 2e9}
    assert not cost.fits
    dense = evaluation_cost(adapters(**NF4), MISTRAL_7B, A100, PAPER_WORK, 1, flat(adapters(**NF4)))
    assert "whole base while loading" not in dense.memory, "working takes more"


@pytest.mark.parametrize(("base", "weights"), [("bf16", 14.5 + 0.08), ("int8", 7.5 + 0.08), ("nf4", 4.1 + 0.08)])
def test_adapters_are_evaluated_on_the_base_on_which_they_train(base: str, weights: float):
    """7.24B: 6.98B in linear layers and the rest at 2 bytes; 42M in adapters at 2."""
    one = adapters(rank=16, base=base, merge=False).with_train(workers=1)
    memory = evaluation_cost(one, MISTRAL_7B, A100, PAPER_WORK, 1, flat(one)).memory
    assert memory["weights"] / 1e9 == pytest.approx(weights, abs=0.05)


def test_merged_iterates_are_evaluated_as_whole_models():
    merged, full = (
        evaluation_cost(config, MISTRAL_7B, A100, PAPER_WORK, 1, flat(config)).memory
        for config in (adapters(rank=16), ZEPHYR.with_train(precision="bf16"))
    )
    assert merged == full


def test_a_card_that_holds_no_whole_copy_of_8b_runs_adapters_on_4_bits():
    """Llama 3.1 8B in packs of 4,096 on 24 GB: evaluation alone would take 16 GB more weights in bf16."""
    shape = ModelShape(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
    )  # fmt: skip
    config = adapters(**NF4).with_train(workers=1, gradient_checkpointing=True, pack_length=4096)
    engine = config.generation.engine.model_copy(update={"max_num_seqs": 64})
    generation = config.generation.model_copy(update={"replicas": 1, "engine": engine})
    config = config.model_copy(update={"generation": generation})
    phases = check_memory(config, shape, Cluster(gpu="RTX-4090", gpus_per_node=1), PAPER_WORK, SPIN)
    needed = {stage.name: stage.needed for phase in phases for stage in phase.stages}
    assert needed["evaluation"] < 15e9
