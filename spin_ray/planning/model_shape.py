"""The shape of a decoder. ``h`` is the hidden width; a multiply-add is 2 FLOPs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

from spin_ray.errors import ModelError
from spin_ray.inputs.engine_sizes import EngineSizes
from spin_ray.inputs.model_folder import read_config
from spin_ray.learner.tensor_plan import DIVIDED, why_not_divided, why_not_split
from spin_ray.learner.weights import count_matrices

_TOLERANCE = 0.02
"""Share of a folder's matrices that the formulas may miss, e.g. biases of experts, which are stacked."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_LAYERS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_LAYERS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    **dict.fromkeys(("glm", "glm4"), (*_ATTENTION, "gate_up_proj", "down_proj")),
    **dict.fromkeys(("gpt_neox", "persimmon"), ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    **dict.fromkeys(("nemotron", "arcee", "apertus", "jais2"), (*_ATTENTION, "up_proj", "down_proj")),
    "nanochat": (*_ATTENTION, "fc1", "fc2"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "starcoder2": (*_ATTENTION, "c_fc", "c_proj"),
}  # fmt: skip
"""Linear layers of a decoder layer, by ``model_type``, where they are not named as Llama's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder with grouped-query attention and feed-forward networks, dense or mixtures of experts."""

    layers: int
    hidden: int
    intermediate: int
    """Width of a feed-forward network or of one expert."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    """True if the head shares the embedding's matrix."""
    experts: int = 0
    """Experts of a layer. 0: dense."""
    active: int = 0
    """Experts per token."""
    shared: int = 0
    """Width of the shared expert."""
    beside: int = 0
    """Parameters that are loaded and trained with the decoder and that text does not use, e.g. a vision tower."""
    linear: tuple[str, ...] = LLAMA_LAYERS
    """Names of a layer's linear layers."""
    tensor_plan: Callable[[int], str | None] | None = field(default=None, compare=False, repr=False)
    """Function from a number of ranks to transformers' reason not to split layers over them. None: sizes decide."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Self:
        """Reads a Hugging Face config.json.

        Raises:
            ModelError: a size is missing, or the formulas do not describe the layers.
        """
        if config.get("model_type") in _FAMILIES:
            return cls._from_sizes(config, source)
        whole, text = _multimodal(config) if config.get("text_config") else (None, {})
        loaded = _loaded_parameters(whole) if text.get("model_type") in _FAMILIES else None
        if loaded is None:
            kind = config.get("model_type")
            raise ModelError(f"{source}: is of the family {kind}, whose weights and cost plan does not know")
        shape = cls._from_sizes(text, source)
        return replace(shape, beside=loaded - shape.parameters)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Reads a model folder's config.json, and compares the formulas with the weights, if it has some.

        With weights, the family may be one that transformers does not have.

        Raises:
            ModelError: a size is missing, or the formulas do not describe the layers.
        """
        config, source = read_config(folder), str(folder / "config.json")
        as_configured = config.get("quantization_config") or config.get("text_config")
        found = None if as_configured else count_matrices(folder)
        if found is None:
            return cls.from_config(config, source)
        shape = cls._from_sizes(config, source)
        layers, embedding = shape.layers * shape.layer_matmuls, shape.vocab * shape.hidden
        counted = layers + embedding * (1 if shape.tied else 2)
        stored = {counted, layers + 2 * embedding}  # some tied models store their head as well
        if all(abs(count / found - 1) > _TOLERANCE for count in stored):
            raise ModelError(
                f"{folder}: has {found:,} weights in matrices, where a decoder like Llama with its config.json has "
                f"{counted:,}; plan does not know the weights and cost of the family {config.get('model_type')}"
            )
        return shape

    @classmethod
    def _from_sizes(cls, config: Mapping[str, Any], source: str) -> Self:
        if len(sorts := set(config.get("mlp_layer_types") or ())) > 1:
            raise ModelError(f"{source}: has {' and '.join(sorted(sorts))} layers, whose cost plan does not know")
        if other := sorted(set(config.get("layer_types") or ()) - _ATTENTION_LAYERS):
            raise ModelError(f"{source}: has layers of the kind {', '.join(other)}, whose cost plan does not know")
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        if missing := [name for name in names if not isinstance(config.get(name), int)]:
            raise ModelError(f"{source}: has no {', '.join(missing)}; plan knows only decoders like Llama")
        for name, trait in _UNKNOWN.items():
            if config.get(name):
                raise ModelError(f"{source}: has {trait} ({name}), whose cost plan does not know")
        layers, hidden, intermediate, heads, vocab = (config[name] for name in names)
        experts = config.get("num_local_experts") or config.get("num_experts") or 0
        return cls(
            layers=layers, hidden=hidden, heads=heads, vocab=vocab,
            intermediate=(config.get("moe_intermediate_size") if experts else None) or intermediate,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            tied=config.get("model_type") in _TIED if (tied := config.get("tie_word_embeddings")) is None else tied,
            experts=experts,
            active=_active_experts(config, source) if experts else 0,
            shared=config.get("shared_expert_intermediate_size") or 0,
            linear=_LAYERS.get(config.get("model_type", ""), LLAMA_LAYERS),
            tensor_plan=partial(_why_not_split, json.dumps(config, default=str)),
        )  # fmt: skip

    @property
    def q(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def layer_matmuls(self) -> int:
        """Weights of a layer's products: 2hq + 2h·kv + 3h·i (2h·i without a gate). Each expert has 3h·i, and h in the
        router.
        """
        return self._matmuls(self.experts)

    @property
    def active_matmuls(self) -> int:
        """Weights of a layer that a token is multiplied with."""
        return self._matmuls(self.active)

    def _matmuls(self, experts: int) -> int:
        widths = 2 * self.q + 2 * self.kv_heads * self.head_dim + self.matrices * self.shared
        return self.hidden * (
            widths + self.experts + self.matrices * self.intermediate * (experts if self.experts else 1)
        )

    @property
    def matrices(self) -> int:
        """Matrices of a feed-forward network: 3 with a gate, else 2."""
        return 3 if {"gate_proj", "gate_up_proj"} & set(self.linear) else 2

    def why_not_split(self, tensor: int) -> str | None:
        """Returns why layers cannot be split over ``tensor`` ranks, or None."""
        if self.tensor_plan:
            return self.tensor_plan(tensor)
        sizes = (self.heads, self.kv_heads, self.intermediate)
        return why_not_divided(dict(zip(DIVIDED.values(), sizes, strict=True)), tensor)

    @property
    def engine_sizes(self) -> EngineSizes:
        """Sizes that vLLM divides."""
        columns = 0 if self.experts else self.intermediate
        return EngineSizes(heads=self.heads, kv_heads=self.kv_heads, columns=columns)

    def split(self, tensor: int) -> Self:
        """Returns one rank's shape in a tensor group, with whole embeddings, head and norms."""
        return replace(
            self, heads=self.heads // tensor, kv_heads=max(1, self.kv_heads // tensor),
            intermediate=self.intermediate // tensor, shared=self.shared // tensor,
        )  # fmt: skip

    @property
    def layer(self) -> int:
        """Parameters of a layer, without biases (under 0.1 %)."""
        return self.layer_matmuls + 2 * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, untied head, last norm, and those beside the decoder."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden + self.beside

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    def trunk_flops(self, tokens: float, attended: float) -> float:
        """Returns the FLOPs of a forward pass below the head, with ``attended`` pairs of tokens (arXiv 2001.08361,
        table 1).
        """
        return self.layers * (2 * self.active_matmuls * tokens + 4 * self.q * attended)

    def head_flops(self, tokens: float) -> float:
        return 2.0 * self.hidden * self.vocab * tokens

    def read(self, tokens: float) -> float:
        """Returns the parameters that a pass over ``tokens`` tokens reads, with balanced routers."""
        used = self.parameters - self.beside
        if not self.experts:
            return used
        idle = (1 - self.active / self.experts) ** tokens
        return used - self.layers * idle * self.matrices * self.hidden * self.intermediate * self.experts

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Returns the bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


_UNKNOWN = {
    "kv_lora_rank": "latent attention", "n_routed_experts": "grouped experts", "moe_layer_freq": "layers of two kinds",
    "first_k_dense_replace": "layers of two kinds", "mlp_only_layers": "layers of two kinds",
    "shared_intermediate_size": "other shared experts", "num_shared_experts": "other shared experts",
}  # fmt: skip
"""Settings of config.json that the formulas do not describe."""

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds in ``layer_types`` that have the weights of attention."""
_FAMILIES = {
    "apertus", "arcee", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm", "diffllama", "ernie4_5", "exaone4",
    "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hyperclovax", "jais2", "llama",
    "mellum", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
}  # fmt: skip
"""Each ``model_type`` of transformers 5.19 whose weights are those of the formulas within 0.5 %."""
_TIED = {
    "cohere", "cohere2", "cohere2_moe", "ernie4_5", "gemma", "gemma2", "gemma3_text",
    "granite_swa", "modernbert-decoder", "smollm3", "starcoder2", "vaultgemma",
}  # fmt: skip
"""Those of them whose config in transformers 5.19 ties the embeddings unless config.json says otherwise."""


@cache
def _why_not_split(described: str, tensor: int) -> str | None:
    return why_not_split(json.loads(described), tensor)


def _multimodal(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns transformers' config of a multimodal model and its language model's whole config, or (None, {}).

    Published folders leave out what transformers' classes have as defaults.
    """
    from transformers import AutoConfig  # slow

    try:
        whole = AutoConfig.for_model(**config)
    except Exception:  # transformers does not take it; a start says why
        return None, {}
    text = whole.get_text_config().to_dict()
    return whole, text | {"tie_word_embeddings": getattr(whole, "tie_word_embeddings", text.get("tie_word_embeddings"))}


def _loaded_parameters(whole: Any) -> int | None:
    """Returns the parameters that a run loads of a multimodal model; None if it is no causal language model."""
    from spin_ray.learner.loading import on_meta  # slow

    try:
        return sum(parameter.numel() for parameter in on_meta(whole).parameters())
    except ValueError:
        return None


def _active_experts(config: Mapping[str, Any], source: str) -> int:
    active = config.get("num_experts_per_tok") or config.get("experts_per_token")
    if not isinstance(active, int):
        raise ModelError(f"{source}: is a mixture of experts without num_experts_per_tok; plan cannot count its FLOPs")
    if config.get("decoder_sparse_step", 1) != 1:
        raise ModelError(f"{source}: has layers of two kinds (decoder_sparse_step), whose cost plan does not know")
    return active


MISTRAL_7B = ModelShape(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=32000, tied=False
)
KNOWN_SHAPES = {"alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B, "mistralai/Mistral-7B-v0.1": MISTRAL_7B}
