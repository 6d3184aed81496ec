"""The shape of a decoder. ``h`` is the hidden width; a multiply-add is 2 FLOPs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from spin_ray.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated feed-forward network."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    """True: the head is the embedding's matrix."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Self:
        """Reads a Hugging Face config.json.

        Raises:
            ModelError: a size is missing, or layers are mixtures of experts.
        """
        config = config.get("text_config", config)
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        if missing := [name for name in names if not isinstance(config.get(name), int)]:
            raise ModelError(f"{source}: has no {', '.join(missing)}; plan knows only decoders like Llama")
        if config.get("num_local_experts") or config.get("num_experts"):
            raise ModelError(f"{source}: is a mixture of experts; plan knows only dense models")
        layers, hidden, intermediate, heads, vocab = (config[name] for name in names)
        return cls(
            layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, vocab=vocab,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip

    @property
    def q(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def layer_matmuls(self) -> int:
        """Weights in a layer's products: 2hq + 2h·kv + 3h·i."""
        return self.hidden * (2 * self.q + 2 * self.kv_heads * self.head_dim + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        """Parameters of a layer, without biases (under 0.1 %)."""
        return self.layer_matmuls + 2 * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, untied head, last norm."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    def trunk_flops(self, tokens: float, attended: float) -> float:
        """Returns the FLOPs of a forward pass below the head (arXiv 2001.08361, table 1).

        They are 2 per weight and token, and 4q per layer and ``attended`` pair.
        """
        return self.layers * (2 * self.layer_matmuls * tokens + 4 * self.q * attended)

    def head_flops(self, tokens: float) -> float:
        return 2.0 * self.hidden * self.vocab * tokens

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Returns one token's bytes of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


MISTRAL_7B = ModelShape(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=32000, tied=False
)
KNOWN_SHAPES = {"alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B, "mistralai/Mistral-7B-v0.1": MISTRAL_7B}
