"""Models that cannot be trained, refused from config.json and the headers of the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from spin_ray.config.sections import LoraConfig
from spin_ray.errors import ConfigError, ModelError
from spin_ray.inputs.architecture import refuse_architecture, refuse_unapplied
from tests.support.model_kinds import KINDS, LONGROPE, ModelKind


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]},
         r"is an encoder-decoder \(T5ForConditionalGeneration\); SPIN needs a causal language model"),
        ({"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]},
         r"is a model of type mistral3, and none of the causal language models of transformers \d"),
        ({"model_type": "qwen9"}, "is a model of type qwen9, and none"),
        ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]},
         "holds a Llama4ForConditionalGeneration, and training would make a Llama4ForCausalLM of it"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
         "holds a LlamaForSequenceClassification, and training would make a LlamaForCausalLM of it"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "holds a BertForMaskedLM"),
        ({"model_type": "mamba2", "hidden_size": 30, "head_dim": 7, "num_heads": 3},
         r"transformers does not take its config\.json \("),
    ],
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        refuse_architecture(folder_of(tmp_path, config), 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "llama", "architectures": ["LLaMAForCausalLM"]},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        {"vocab_size": 7},
    ],
)
def test_causal_language_models_pass(tmp_path: Path, config: dict[str, Any]) -> None:
    """Gemma 3 with its eyes is trained and exported as what it is."""
    refuse_architecture(folder_of(tmp_path, config), 64)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 100},
        {"rope_scaling": {"type": "su", "original_max_position_embeddings": 100}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 100},
        {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "longrope"}},
                         "original_max_position_embeddings": 100}},
        LONGROPE,
    ],
)  # fmt: skip
def test_a_rotary_embedding_that_switches_is_told_at_the_start(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = folder_of(tmp_path, {"max_position_embeddings": 4096} | rope)
    refuse_architecture(folder, 100)
    with pytest.raises(ConfigError, match=r"model\.max_length: 101 is too long for .* at most that$"):
        refuse_architecture(folder, 101)


def test_a_model_without_a_head_of_its_own_is_refused_unless_its_embeddings_are_tied(tmp_path: Path) -> None:
    """transformers would make the head up; config.json need not say that Llama's embeddings are not tied."""
    KINDS["Qwen3"].make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    refuse_architecture(tmp_path, 64)
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"has no head \(lm_head\), and its embeddings are not tied"):
        refuse_architecture(tmp_path, 64)
    config = AutoConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    refuse_architecture(tmp_path, 64)


def test_embeddings_of_another_size_than_the_config_says_are_refused(tmp_path: Path) -> None:
    ModelKind("gpt2").make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wte.weight"] = torch.zeros(64, 32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"wte\.weight has 64 rows, and config\.json a vocab_size of 61; save the model"
    ):
        refuse_architecture(tmp_path, 64)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (KINDS["DeepSeek-V2"], "kv_b_proj"),
        (ModelKind("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 16}), "shared_expert_gate"),
    ],
)
def test_adapters_that_vllm_would_drop_are_refused(tmp_path: Path, kind: ModelKind, layer: str) -> None:
    kind.make().save_pretrained(tmp_path)
    for targets in ("all-linear", (layer,), ("q_proj", f"self_attn.{layer}")):
        with pytest.raises(ConfigError, match=f"vLLM does not apply adapters of {layer}, .*merge: true"):
            refuse_unapplied(tmp_path, LoraConfig(target_modules=targets))
    refuse_unapplied(tmp_path, LoraConfig(target_modules=("o_proj", "down_proj")))


def test_adapters_of_most_families_are_applied(tmp_path: Path) -> None:
    KINDS["Qwen3-MoE"].make().save_pretrained(tmp_path)
    refuse_unapplied(tmp_path, LoraConfig())
