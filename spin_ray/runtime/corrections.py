"""Corrections of what vLLM reads in a model's config.json, so that it computes what transformers computes.

Training is transformers' arithmetic. Read otherwise, the same folder is another model, and the opponent is not θ_t.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spin_ray.errors import ModelError, first_line


def corrections(
    folder: Path, extra: dict[str, Any], *, on_cpu: bool, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Returns vLLM's arguments for a model folder, if its family needs any; empty otherwise.

    Args:
        extra: the recipe's arguments for vLLM. What its ``hf_overrides`` names is left as it says.

    Raises:
        ModelError: the folder's config.json cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read ({first_line(error)})") from error
    given = extra.get("hf_overrides") or {}
    if not isinstance(given, dict):  # a function, which only the Python API can give
        return {}
    found = _window(config) | _router(config) | _rope(config)
    arguments: dict[str, Any] = {"hf_overrides": found | given} if found else {}
    if on_cpu and _has_latent_attention(config) and "compilation_config" not in extra:
        # vLLM 0.29's kernel for CPUs turns every token's query but the first one's by another token's position.
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def _has_latent_attention(config: Any) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None


def _window(config: Any) -> dict[str, Any]:
    """Shortens Cohere 2's windows, which vLLM 0.29 makes a token longer than transformers (models/commandr.py)."""
    window = getattr(config, "sliding_window", None)
    return {"sliding_window": window - 1} if config.model_type == "cohere2" and window else {}


def _router(config: Any) -> dict[str, Any]:
    """Names DeepSeek-V3's way to choose experts, which transformers knows without a setting."""
    named = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"} if config.model_type == "deepseek_v3" else {}
    return {name: value for name, value in named.items() if not hasattr(config, name)}


def _rope(config: Any) -> dict[str, Any]:
    """Tells vLLM YaRN's factor of attention, and Ministral 3's temperature by position (vllm-project/vllm#48621).

    vLLM 0.29 knows neither ``attention_factor`` nor ``mscale`` of YaRN, except for latent attention, and looks for the
    temperature outside ``rope_parameters``.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn" or _has_latent_attention(config) or "mrope_section" in rope:
        return {}
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    found: dict[str, Any] = {"rope_parameters": rope | {"apply_yarn_scaling": False, "attn_factor": factor}}
    if beta := rope.get("llama_4_scaling_beta"):
        original = rope["original_max_position_embeddings"]
        found["llama_4_scaling"] = {"original_max_position_embeddings": original, "beta": beta}
    return found
