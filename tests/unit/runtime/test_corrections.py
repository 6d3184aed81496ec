"""What vLLM is told of families that it reads otherwise. tests/e2e compares the tokens themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from spin_ray.errors import ModelError
from spin_ray.runtime.corrections import corrections

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
RATIO = {"mscale": 1.0, "mscale_all_dim": 1.0}
ONE_GROUP = {"n_group": 1, "topk_group": 1}


def corrected(folder: Path, model_type: str, extra: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return corrections(folder, extra or {}, on_cpu=False)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4096}),
        ("qwen3", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("deepseek_v2", ONE_GROUP | {"rope_parameters": YARN | RATIO}),  # vLLM's latent attention knows both
        ("deepseek_v3", {"rope_parameters": YARN | RATIO, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    ],
)
def test_most_families_need_none(tmp_path, model_type, settings):
    assert corrected(tmp_path, model_type, **settings) == {}


@pytest.mark.parametrize(
    ("rope", "factor"),
    [
        ({}, 0.1 * math.log(16) + 1),  # as YaRN's paper has it
        (RATIO, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(16) + 1) / (0.1 * math.log(16) + 1)),
        ({"attention_factor": 1.3}, 1.3),
    ],
)
def test_vllm_is_told_transformers_factor_of_yarn(tmp_path, rope, factor):
    found = corrected(tmp_path, "qwen3", rope_parameters=YARN | rope)["hf_overrides"]["rope_parameters"]
    assert found["attn_factor"] == pytest.approx(factor)
    assert found["apply_yarn_scaling"] is False
    assert found.items() >= YARN.items()


def test_ministral_3_keeps_its_temperature_by_position(tmp_path):
    found = corrected(tmp_path, "ministral3", rope_parameters=YARN | RATIO | {"llama_4_scaling_beta": 0.1})
    assert found["hf_overrides"]["llama_4_scaling"] == {"original_max_position_embeddings": 16384, "beta": 0.1}
    assert found["hf_overrides"]["rope_parameters"]["attn_factor"] == 1.0


def test_yarn_of_one_kind_of_layers_keeps_the_other(tmp_path):
    plain = {"rope_type": "default", "rope_theta": 1e4}
    rope = {"full_attention": YARN | {"attention_factor": 1.3}, "sliding_attention": plain}
    found = corrected(tmp_path, "gemma3_text", rope_parameters=rope)["hf_overrides"]["rope_parameters"]
    assert found["sliding_attention"] == plain
    assert (found["full_attention"]["attn_factor"], found["full_attention"]["apply_yarn_scaling"]) == (1.3, False)


def test_with_latent_attention_the_factor_is_beside_vllms_own(tmp_path):
    """vLLM multiplies by the ratio of both mscale, of which it takes the second for 0 where it is not given."""
    rope = YARN | RATIO | {"attention_factor": 1.3}
    found = corrected(tmp_path, "deepseek_v2", rope_parameters=rope, **ONE_GROUP)["hf_overrides"]["rope_parameters"]
    assert found["attn_factor"] == pytest.approx(1.3)
    assert "apply_yarn_scaling" not in found, "it would be another kind of rope"


@pytest.mark.parametrize(("model_type", "wanted"), [("cohere2", 4095), ("cohere2_moe", 4095), ("llama", None)])
def test_windows_are_transformers(tmp_path, model_type, wanted):
    """vLLM adds one to Cohere 2's, and gives Llama one if its config names it, as that of a converted Mistral may."""
    assert corrected(tmp_path, model_type, sliding_window=4096) == {"hf_overrides": {"sliding_window": wanted}}


def test_deepseek_v2_weighs_and_groups_experts_as_transformers_does(tmp_path):
    settings = {"topk_method": "greedy", "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
    assert corrected(tmp_path, "deepseek_v2", **settings) == {"hf_overrides": {"norm_topk_prob": False, "n_group": 1}}
    grouped = settings | {"topk_method": "group_limited_greedy", "norm_topk_prob": False}
    assert corrected(tmp_path, "deepseek_v2", **grouped) == {}


def test_null_in_the_recipe_overrides_nothing(tmp_path):
    found = corrected(tmp_path, "cohere2", {"hf_overrides": None}, sliding_window=4096)
    assert found == {"hf_overrides": {"sliding_window": 4095}}


def test_deepseek_v3_chooses_experts_as_transformers_does(tmp_path):
    """A folder that transformers made names no way; one from the hub does."""
    found = corrected(tmp_path, "deepseek_v3", topk_method="noaux_tc")
    assert found == {"hf_overrides": {"scoring_func": "sigmoid"}}


def test_on_cpus_latent_attention_leaves_vllms_rotary_kernel_alone(tmp_path):
    corrected(tmp_path, "deepseek_v2", **ONE_GROUP)
    slower = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    assert corrections(tmp_path, {}, on_cpu=True) == slower
    for given, made in [
        ({"mode": 0}, {"mode": 0, "custom_ops": ["-rotary_embedding"]}),
        (3, {"mode": 3, "custom_ops": ["-rotary_embedding"]}),
        (None, {"custom_ops": ["-rotary_embedding"]}),
        ({"custom_ops": ["+rms_norm"]}, {"custom_ops": ["+rms_norm", "-rotary_embedding"]}),
        ({"custom_ops": ["all"]}, {"custom_ops": ["all"]}),
    ]:
        assert corrections(tmp_path, {"compilation_config": given}, on_cpu=True) == {"compilation_config": made}
    corrected(tmp_path, "llama")
    assert corrections(tmp_path, {}, on_cpu=True) == {}


def test_what_the_recipe_overrides_stays_as_it_says(tmp_path):
    mine = {"hf_overrides": {"sliding_window": 100, "rms_norm_eps": 1e-6}}
    assert corrected(tmp_path, "cohere2", mine, sliding_window=4096) == mine
    assert corrected(tmp_path, "llama", mine) == {}, "the recipe's own arguments reach vLLM anyway"


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=rf"{tmp_path}: config.json cannot be read"):
        corrections(tmp_path, {}, on_cpu=False)
