"""Parameters of a decoder: by hand on a tiny one, and those of published models."""

from dataclasses import replace

import pytest

from spin_ray.errors import ModelError
from spin_ray.planning.model_shape import KNOWN_SHAPES, MISTRAL_7B, ModelShape
from tests.support.planning_cases import TINY, ZEPHYR


def test_parameters_of_the_tiny_decoder_by_hand():
    """2·(576 + 16) + 168 = 1352."""
    assert (TINY.layer_matmuls, TINY.layer, TINY.root, TINY.parameters) == (576, 592, 168, 1352)
    assert replace(TINY, tied=True).parameters == 1352 - 80


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (MISTRAL_7B, 7_241_732_096),
        (replace(MISTRAL_7B, vocab=128_256), 8_030_261_248),  # Llama 3.1 8B
        (
            ModelShape(
                layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
            ),
            134_515_008,  # SmolLM2-135M
        ),
    ],
)
def test_parameters_are_those_that_published_models_have(shape, parameters):
    assert shape.parameters == parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "has no num_hidden_layers"),
        ({"num_local_experts": 8}, "mixture of experts without num_experts_per_tok"),
        ({"n_routed_experts": 8}, "grouped experts"),
        ({"kv_lora_rank": 8}, "latent attention"),
    ],
)
def test_a_model_that_the_formulas_do_not_describe_is_refused(config, message):
    whole = dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), 8
    )
    with pytest.raises(ModelError, match=message):
        ModelShape.from_config(config if "hidden_size" in config else whole | config, "m/config.json")


def test_the_zephyr_recipe_is_a_known_shape():
    assert KNOWN_SHAPES[ZEPHYR.model.path] == MISTRAL_7B


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (  # Mixtral 8x7B: 46.7B and 12.9B (arXiv 2401.04088: 47B and 13B)
            {
                "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
            },
            46_702_792_704, 12.9e9,
        ),
        (  # Qwen3-30B-A3B: 30.5B and 3.3B (its model card)
            {
                "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
                "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            },
            30_532_110_336, 3.35e9,
        ),
    ],
)  # fmt: skip
def test_a_token_of_a_mixture_is_multiplied_with_the_active_experts_alone(config, parameters, active):
    shape = ModelShape.from_config(config, "m/config.json")
    assert shape.parameters == pytest.approx(parameters, rel=1e-4)
    assert shape.layers * shape.active_matmuls + shape.root == pytest.approx(active, rel=0.01)
    assert shape.read(1) == pytest.approx(active, rel=0.01), "one token reads what it is multiplied with"
    assert shape.read(1000) == pytest.approx(parameters, rel=1e-3), "many tokens read every expert"
