"""A small model of the same architecture with random weights, to check before a run that training can score it."""

import copy
import json
from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spin_ray.errors import ModelError
from spin_ray.learner.decoder import layers_of_every_kind
from spin_ray.learner.hf_folder import first_attention, lacking
from spin_ray.learner.layout import CPU, try_layouts
from spin_ray.learner.layout_probe import Probe
from spin_ray.learner.loading import keep_layers, missing_weights, on_meta

VOCABULARY = 64
HEADS = 4
WIDTH = 256
"""Width of the model, if the config sets the width of heads separately."""
REACH = 768
"""Longest sequence; BigBird's attention is sparse from 704 tokens on."""
SPARSE_TOKENS = 32
"""Tokens that sparse attention selects, few enough for short sequences to show it."""
MOST_BYTES = 2**28
"""Largest size of the weights, in bytes."""
GAIN = 1.1
"""Standard deviation of weights, times √width: log-probabilities then depend strongly on every token."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_STATES = {"mamba_d_state": 16, "state_size": 16, "mamba_chunk_size": 32, "chunk_size": 32}
_INNER_WIDTHS = ("intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "ffn_hidden_size", "ffn_dim")


def refuse_unscorable(folder: Path, wanted: Literal["auto", "packed", "padded"], max_length: int) -> None:
    """Checks before a run that training can load and score the architecture.

    A model that cannot be made small passes; training's own probe checks it later.

    Raises:
        ModelError: weights are missing, tokens see what follows them, or no way of scoring gives the model's own
            numbers.
    """
    if missing := missing_weights(folder):
        raise ModelError(lacking(folder, missing))
    described = (folder / "config.json").read_text(encoding="utf-8")
    if why := why_not(described, wanted, max_length):
        raise ModelError(f"{folder}: {why}")


@lru_cache(maxsize=64)
def why_not(described: str, wanted: Literal["auto", "packed", "padded"], max_length: int) -> str | None:
    """Returns why the architecture of a config.json cannot be scored, or None.

    Two random seeds must agree: with one, a router may break a tie differently by chance.
    """
    settings = json.loads(described)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception:  # inputs/architecture.py reports it
        return None
    return _why_not(config, wanted, max_length, seed=0) and _why_not(config, wanted, max_length, seed=1)


def _why_not(config: Any, wanted: Any, max_length: int, seed: int) -> str | None:
    for small in _cuts(config, max_length):
        try:
            model = _made(small, seed)
            probe = Probe(model, max_length, CPU, torch.float32, reach=REACH) if model else None
        except Exception:  # mismatched widths or too little memory: the next cut, or training's probe, decides
            continue
        if model is None or probe is None:
            continue
        try:
            try_layouts(model, wanted, probe)
        except ModelError as error:
            return str(error)
        return None
    return None


def _cuts(config: Any, max_length: int) -> Iterator[Any]:
    """Yields smaller configs, the smallest first."""
    for cut in (_narrow, _few_experts, lambda text: None):
        try:
            smaller = copy.deepcopy(config)
            text = smaller.get_text_config()
            cut(text)
            _few_tokens(smaller, text)
            for part in smaller.sub_configs:  # e.g. the vision tower
                if part != "text_config" and hasattr(getattr(smaller, part), "num_hidden_layers"):
                    getattr(smaller, part).num_hidden_layers = 1
            if (getattr(text, "index_topk", None) or max_length) < max_length:
                text.index_topk = min(text.index_topk, SPARSE_TOKENS)
            keep_layers(smaller, layers_of_every_kind(on_meta(smaller)))
        except Exception:
            continue
        yield smaller


def _narrow(text: Any) -> None:
    _few_experts(text)
    # Each head keeps its width.
    width, heads = text.hidden_size, getattr(text, "num_attention_heads", None) or 1
    few = min(heads, HEADS)
    text.hidden_size = min(width, WIDTH) if text.to_dict().get("head_dim") else width // heads * few
    if hasattr(text, "num_attention_heads"):
        text.num_attention_heads = few
    _few_states(text)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if hasattr(text, name):
            setattr(text, name, max(1, few * (getattr(text, name) or heads) // heads))
    if hasattr(text, "index_n_heads"):
        text.index_n_heads = min(text.index_n_heads, HEADS)
    for name in _INNER_WIDTHS:
        if isinstance(there := getattr(text, name, None), int):
            setattr(text, name, max(16, there * text.hidden_size // width // 16 * 16))


def _few_states(text: Any) -> None:
    # State-space and linear-attention layers are slow without kernels.
    for number, each, times in (("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("num_heads", "head_dim", "expand")):
        if hasattr(text, number) and hasattr(text, times):
            setattr(text, number, getattr(text, times) * text.hidden_size // getattr(text, each))
    if getattr(text, "mamba_d_ssm", None):
        text.mamba_d_ssm = text.mamba_n_heads * text.mamba_d_head
    if pairs := getattr(text, "linear_num_key_heads", None):
        text.linear_num_key_heads, text.linear_num_value_heads = 1, text.linear_num_value_heads // pairs
    for name, most in _STATES.items():
        if isinstance(there := getattr(text, name, None), int):
            setattr(text, name, min(there, most))


def _few_experts(text: Any) -> None:
    taken = max((getattr(text, name, None) or 1 for name in _EXPERTS_PER_TOKEN), default=1)
    groups = getattr(text, "n_group", None) or 1
    within = getattr(text, "topk_group", None) or 1
    needed = groups * max(2, ceil(taken / within))
    for name in _EXPERTS:
        if isinstance(there := getattr(text, name, None), int) and there > needed:
            setattr(text, name, max(needed, 4))


def _few_tokens(config: Any, text: Any) -> None:
    for scope in {id(it): it for it in (config, text)}.values():
        for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
            if getattr(scope, name, None) is not None:
                setattr(scope, name, number)
    text.vocab_size = min(text.vocab_size, VOCABULARY)


def _made(config: Any, seed: int) -> Any | None:
    if sum(it.numel() for it in on_meta(config).parameters()) * 4 > MOST_BYTES:
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=first_attention(config)
        ).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases, sinks: their initial values would have no effect
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(GAIN / parameter.shape[-1] ** 0.5 / parameter.std().clamp_min(1e-6))
    return model
