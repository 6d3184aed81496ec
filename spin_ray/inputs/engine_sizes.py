"""The numbers of GPUs over which vLLM can split a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.tensor_plan import text_config_of

_KV_HEADS = ("num_kv_heads", "num_key_value_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Sizes of a layer that vLLM 0.29 divides (config/model.py, layers/linear.py)."""

    heads: int
    kv_heads: int
    columns: int = 0
    """Width of a dense feed-forward network. 0: unknown, or a mixture of experts."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """Returns the sizes of a model's config.json; None if they are unknown."""
        text = text_config_of(config)
        heads = _count(text, "num_attention_heads")
        if not heads:
            return None
        experts = any(_count(text, name) for name in _EXPERTS)
        columns = 0 if experts else _count(text, "intermediate_size")
        return cls(heads=heads, kv_heads=_kv_heads(text, heads), columns=columns)

    @property
    def usable(self) -> list[int]:
        return [size for size in range(1, self.heads + 1) if not self.why_not(size)]

    def why_not(self, size: int) -> str | None:
        """Returns why ``size`` GPUs cannot split a layer, or None. A key and value head may be on several GPUs."""
        if self.heads % size:
            return f"{size} does not divide the model's {self.heads} attention heads"
        if self.kv_heads % size and size % self.kv_heads:
            return f"neither {size} nor the model's {self.kv_heads} key and value heads divides the other"
        if self.columns % size:
            return f"{size} does not divide the model's {self.columns} columns of the feed-forward network"
        return None


def check_engines(config: SpinConfig, sizes: EngineSizes) -> None:
    """Raises ConfigError for an engine that vLLM would refuse to start."""
    for section, engine in (("generation", config.generation.engine), ("serving", config.serving.engine)):
        if engine and (reason := sizes.why_not(engine.tensor_parallel_size)):
            *others, last = sizes.usable
            given = f"{', '.join(map(str, others))} or {last}" if others else str(last)
            raise ConfigError(f"{section}.engine.tensor_parallel_size: {reason}, as vLLM needs; give {given}")


def _kv_heads(text: Any, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return next(filter(None, (_count(text, name) for name in _KV_HEADS)), heads)


def _count(text: Any, name: str) -> int:
    """Returns a number of transformers' config; 0 if it has none, or another for each layer."""
    try:
        found = getattr(text, name)
    except Exception:  # missing, or ambiguous
        return 0
    return found if isinstance(found, int) else 0
