"""Corrections of a model's config.json, so that vLLM computes what transformers computes.

Otherwise vLLM would not generate from θ_t, which transformers trains. docs/models.md lists the differences of vLLM
0.29.
"""

import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spin_ray.errors import ModelError, first_line


def corrections(
    folder: Path, extra: dict[str, Any], *, on_cpu: bool, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Returns vLLM's arguments for a model folder; empty if its family needs none.

    Args:
        extra: the recipe's arguments for vLLM. Its ``hf_overrides`` take precedence.

    Raises:
        ModelError: the folder's config.json cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read ({first_line(error)})") from error
    found = _window(config) | _router(config) | _rope(config)
    arguments: dict[str, Any] = {"hf_overrides": found | (extra.get("hf_overrides") or {})} if found else {}
    if on_cpu and _has_latent_attention(config):
        arguments["compilation_config"] = _without_kernel(extra.get("compilation_config") or {})
    return arguments


def _has_latent_attention(config: Any) -> bool:
    """Tells whether vLLM's attention uses the latent itself; for MiniCPM 3, vLLM expands it."""
    return getattr(config, "kv_lora_rank", None) is not None and config.model_type != "minicpm3"


def _without_kernel(given: dict[str, Any] | int) -> dict[str, Any]:
    """Disables the rotary kernel for CPUs, which rotates queries of several heads by wrong positions."""
    settings: dict[str, Any] = {"mode": given} if isinstance(given, int) else given
    named: list[str] = settings.get("custom_ops", [])
    decided = any(name in ("all", "none") or name.endswith("rotary_embedding") for name in named)
    return settings | {"custom_ops": named if decided else [*named, "-rotary_embedding"]}


def _window(config: Any) -> dict[str, Any]:
    """Returns the sliding window that vLLM needs, if config.json has another.

    vLLM makes Cohere 2's windows a token longer (models/commandr.py). It applies ``sliding_window`` to all layers of
    any family, but transformers reads it only if the family's config class has it.
    """
    window = getattr(config, "sliding_window", None)
    if not window:
        return {}
    if config.model_type in ("cohere2", "cohere2_moe"):
        return {"sliding_window": window - 1}
    return {} if _reads_windows(config) else {"sliding_window": None}


def _reads_windows(config: Any) -> bool:
    try:
        return hasattr(type(config)(), "sliding_window")
    except Exception:  # a config of the folder's own code
        return True


def _router(config: Any) -> dict[str, Any]:
    """Returns DeepSeek's settings for choosing experts, where transformers ignores what vLLM reads.

    transformers has none of them for V3. For V2 it never normalises weights, and uses groups only with
    ``group_limited_greedy``.
    """
    wanted: dict[str, Any] = {}
    if config.model_type in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa"):
        wanted = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    elif config.model_type == "deepseek_v2":
        wanted = {"norm_topk_prob": False}
        if getattr(config, "topk_method", "greedy") != "group_limited_greedy":
            wanted |= {"n_group": 1, "topk_group": 1}
    return {name: value for name, value in wanted.items() if getattr(config, name, None) != value}


def _rope(config: Any) -> dict[str, Any]:
    """Returns YaRN's attention factor and Ministral 3's temperature by position (vllm-project/vllm#48621).

    vLLM ignores ``attention_factor``, reads ``mscale`` only for latent attention, and looks for the temperature outside
    ``rope_parameters``.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(each, dict) for each in rope.values()):  # one entry for each kind of layer
        each = {kind: _yarn(config, own, kind) for kind, own in rope.items()}
        return {"rope_parameters": each} if each != rope else {}
    corrected = _yarn(config, rope)
    found: dict[str, Any] = {"rope_parameters": corrected} if corrected != rope else {}
    if beta := rope.get("llama_4_scaling_beta"):
        original = rope["original_max_position_embeddings"]
        found["llama_4_scaling"] = {"original_max_position_embeddings": original, "beta": beta}
    return found


def _yarn(config: Any, rope: Any, kind: str | None = None) -> Any:
    """Returns ``rope``; for YaRN, with the factor by which vLLM multiplies cosines and sines.

    With latent attention, vLLM multiplies this factor by its own ratio of ``mscale``.
    """
    if (
        not isinstance(rope, dict)
        or rope.get("rope_type") != "yarn"
        or not rope.get("factor")
        or "mrope_section" in rope
    ):
        return rope
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu", layer_type=kind)
    if not _has_latent_attention(config):
        return rope | {"apply_yarn_scaling": False, "attn_factor": wanted}
    own = _mscale(rope["factor"], rope.get("mscale", 1.0)) / _mscale(rope["factor"], rope.get("mscale_all_dim", 0.0))
    return rope if math.isclose(own, wanted) else rope | {"attn_factor": wanted / own}


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
