"""The weights that training holds, sends and updates: all, or adapters on a frozen base."""

from dataclasses import dataclass

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig
from spin_ray.planning.model_shape import ModelShape

BASE_BYTES = {"bf16": 0.0, "int8": 1.0 + 2 / 4096, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}
"""Bytes per quantised weight of a linear layer, with scales; ``bf16`` is not quantised.

int8: one fp16 scale per row, of 4096 (arXiv 2208.07339). nf4: an 8-bit scale per 64 weights and an fp32 scale per 256
of those (arXiv 2305.14314, double quantisation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weights that FSDP2 gathers together: a layer, or the root (all that is outside the layers)."""

    trained: float
    """Parameters with fp32 states."""
    frozen: float
    """Bytes of sharded frozen weights, as stored."""
    whole: float = 0.0
    """Bytes of quantised weights, which cannot be sharded."""
    gathered: float
    """Bytes that a gather moves."""
    computed: float
    """Bytes in the format of the computation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    layers: int
    layer: Unit
    root: Unit

    @property
    def trained(self) -> float:
        return self.layers * self.layer.trained + self.root.trained

    @property
    def frozen(self) -> float:
        return self.layers * self.layer.frozen + self.root.frozen

    @property
    def whole(self) -> float:
        return self.layers * self.layer.whole


def weights_of(config: SpinConfig, shape: ModelShape, *, trains: bool = True) -> Weights:
    """Returns the weights of a stage. Without training all are frozen, in the format of the computation."""
    size = dtype_bytes(config)
    if not trains:
        layer, root = (_all(count, size, trained=False) for count in (shape.layer, shape.root))
    elif config.train.lora is None:
        layer, root = (_all(count, size, trained=True) for count in (shape.layer, shape.root))
    else:
        layer, root = _with_adapters(config.train.lora, shape, size), _all(shape.root, size, trained=False)
    return Weights(layers=shape.layers, layer=layer, root=root)


def _all(count: float, size: int, *, trained: bool) -> Unit:
    return Unit(
        trained=count if trained else 0, frozen=0 if trained else size * count, gathered=size * count,
        computed=size * count,
    )  # fmt: skip


def _with_adapters(lora: LoraConfig, shape: ModelShape, size: int) -> Unit:
    adapters = lora.rank * adapted_widths(lora, shape)
    quantised = 0 if lora.base == "bf16" else shape.layer_matmuls
    sharded = shape.layer - quantised
    return Unit(
        trained=adapters,
        frozen=size * sharded,
        whole=quantised * BASE_BYTES[lora.base],
        gathered=size * (adapters + sharded),
        computed=size * (adapters + shape.layer),
    )


def adapted_widths(lora: LoraConfig, shape: ModelShape) -> int:
    """Returns the inputs and outputs of a layer's adapted matrices. PEFT adapts no fused experts."""
    kv, feed_forward = shape.kv_heads * shape.head_dim, 0 if shape.experts else shape.intermediate
    widths = {
        "q_proj": shape.hidden + shape.q, "k_proj": shape.hidden + kv, "v_proj": shape.hidden + kv,
        "o_proj": shape.q + shape.hidden,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.hidden + feed_forward if feed_forward else 0),
    }  # fmt: skip
    names = widths if lora.target_modules == "all-linear" else lora.target_modules
    return sum(widths.get(name, 0) for name in names)


def dtype_bytes(config: SpinConfig) -> int:
    """Returns the bytes of a number in the computation."""
    return 2 if config.train.precision == "bf16" else 4
