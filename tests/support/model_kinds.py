"""Tiny random models of many families, with the traits that a scorer can get wrong."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spin_ray.learner.hf_folder import first_attention

VOCABULARY = 61
MAX_LENGTH = 64
WINDOW = 12
"""Window shorter than the rows, longer than the probe's short rows."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.5,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_hidden_layers": 3, **_EXPERTS,
}  # fmt: skip
_STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS,
}  # fmt: skip
_TWO_KINDS = ["sliding_attention", "full_attention"]
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 100,
}  # fmt: skip
LONGROPE = {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 100}


@dataclass(frozen=True)
class ModelKind:
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    trait: str = ""
    layout: str = "packed"
    truth: str = "eager"
    """transformers' attention that scores are compared with."""

    def make(self, **more: Any) -> Any:
        """Returns the model, random in each parameter; log-probabilities depend strongly on every token."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **(_SIZES | self.settings | more))
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=first_attention(config)
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms, biases, sinks: as made, they would change nothing
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model


KINDS: dict[str, ModelKind] = {
    "Llama": ModelKind("llama", {"tie_word_embeddings": True}),
    "Mistral": ModelKind("mistral", {"sliding_window": WINDOW}, "a window in every layer"),
    "Ministral 3": ModelKind(
        "ministral3",
        {"head_dim": 8, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "temperature by position",
    ),
    "Mixtral": ModelKind("mixtral", {"num_local_experts": 4, "sliding_window": None}, "experts"),
    "Qwen2.5": ModelKind(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
        "biases, a window in later layers",
    ),
    "Qwen3": ModelKind("qwen3", {"head_dim": 8}, "normed queries and keys"),
    "Qwen3-MoE": ModelKind("qwen3_moe", {"head_dim": 8, "num_experts": 4, **_EXPERTS}, "experts"),
    "Gemma 2": ModelKind(
        "gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
         "sliding_window": WINDOW, "layer_types": _TWO_KINDS},
        "soft-capped attention and logits, windows",
    ),
    "Gemma 3 (text)": ModelKind(
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": _TWO_KINDS},
        "windows, two rotary bases",
    ),
    "Phi-3": ModelKind("phi3", {"sliding_window": WINDOW}, "fused projections, a window"),
    "Phi-4": ModelKind(
        "phi3", {**LONGROPE}, "rotary factors that switch by length"
    ),
    "SmolLM3": ModelKind("smollm3", {"no_rope_layers": [1, 0]}, "layers without positions"),
    "OLMo 2": ModelKind("olmo2", {}, "norms after the layers"),
    "Granite": ModelKind(
        "granite",
        {"logits_scaling": 3.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
        "scaled logits, embeddings, residuals",
    ),
    "Cohere 2": ModelKind(
        "cohere2", {"logit_scale": 0.3, "sliding_window": WINDOW, "layer_types": _TWO_KINDS}, "scaled logits, windows"
    ),
    "DeepSeek-V2": ModelKind("deepseek_v2", _LATENT, "latent attention, experts after a dense layer"),
    "DeepSeek-V3": ModelKind(
        "deepseek_v3",
        {**_LATENT, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "latent attention, grouped experts, YaRN"
    ),
    "gpt-oss": ModelKind(
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
         "layer_types": _TWO_KINDS},
        "attention sinks, windows, fused experts"
    ),
    "Falcon": ModelKind("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "parallel attention"),
    "Falcon (ALiBi)": ModelKind("falcon", {"alibi": True}, "positions in the mask", "padded", "sdpa"),
    "GPT-2": ModelKind("gpt2", {"resid_pdrop": 0.5, "n_inner": 48}, "learned positions"),
    "Llama 4 (text)": ModelKind(
        "llama4_text",
        {"attention_chunk_size": WINDOW, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48,
         "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
         "interleave_moe_layer_step": 2},
        "chunks, temperature by position", layout="padded"
    ),
    "Mamba 2": ModelKind(
        "mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}, "state space",
        layout="padded",
    ),
    "LFM2": ModelKind(
        "lfm2", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 2 + ["conv"]},
        "a convolution in a late layer", layout="padded"
    ),
    "Jamba": ModelKind(
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "state space and attention", layout="padded"
    ),
    "Falcon-H1": ModelKind("falcon_h1", {"mamba_d_ssm": 64, **_STATE}, "state space beside attention", layout="padded"),
    "Granite 4 (hybrid)": ModelKind(
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48,
         "logits_scaling": 3.0, **_STATE},
        "state space and attention", layout="padded",
    ),
    "Qwen3-Next": ModelKind(
        "qwen3_next", {"layer_types": ["full_attention", "linear_attention"], **_LINEAR}, "linear attention, experts",
        layout="padded"
    ),
}  # fmt: skip
