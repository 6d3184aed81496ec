"""Which models can be split over a tensor group, by transformers' plan for them."""

import pytest
import torch
from transformers import ApertusConfig, AutoModelForCausalLM, LlamaConfig

from spin_ray.learner.backends.meshes import parameters_beside_the_plan
from spin_ray.learner.tensor_plan import why_not_split
from tests.support.planning_cases import MISTRAL


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MISTRAL, None),
        (MISTRAL | {"num_attention_heads": 33}, "2 does not divide the model's 33 attention heads"),
        (MISTRAL | {"intermediate_size": 99}, "2 does not divide the model's 99 columns of the feed-forward network"),
        ({"model_type": "gpt2"}, "transformers has no tensor plan for a model of type gpt2"),
        ({"model_type": "mixtral"}, "tensor plan for a model of type mixtral uses moe_tp_experts, packed_colwise"),
        ({"model_type": "granite_swa"}, "transformers' tensor plan for a model of type granite_swa "),
        ({"model_type": "mine"}, "transformers does not take this config.json of type 'mine'"),
        (MISTRAL | {"hidden_size": "wide"}, "transformers does not take this config.json of type 'mistral'"),
    ],
)
def test_models_that_cannot_be_split_are_named_with_the_reason(config, reason):
    found = why_not_split(config, 2)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(LlamaConfig, set()), (ApertusConfig, {"layers.*.mlp.act_fn.alpha_n", "layers.*.mlp.act_fn.alpha_p"})],
)
def test_weights_that_would_get_a_part_of_their_gradient_are_found(kind, expected):
    """Apertus has learned activations between split products, which transformers' plan does not name."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**sizes, num_attention_heads=4, num_key_value_heads=2))
    assert parameters_beside_the_plan(model) == expected
