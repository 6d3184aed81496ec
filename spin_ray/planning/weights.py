"""The weights that training holds, sends and updates: all, or adapters on a frozen base."""

from dataclasses import dataclass

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig
from spin_ray.errors import ConfigError
from spin_ray.planning.model_shape import ModelShape

BASE_BYTES = {"bf16": 0.0, "int8": 1.0 + 2 / 4096, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}
"""Bytes per quantised weight of a linear layer, with scales. ``bf16`` is not quantised.

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
    """Bytes that a gather moves, in the format of the computation."""
    dequantised: float = 0.0
    """Bytes of quantised weights in the format of the computation."""


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
    size, lora = dtype_bytes(config), config.train.lora
    layer = _with_adapters(lora, shape, size, trains=trains) if lora else _all(shape.layer, size, trains=trains)
    return Weights(layers=shape.layers, layer=layer, root=_all(shape.root, size, trains=trains and lora is None))


def _all(count: float, size: int, *, trains: bool) -> Unit:
    return Unit(trained=count if trains else 0, frozen=0 if trains else size * count, gathered=size * count)


def _with_adapters(lora: LoraConfig, shape: ModelShape, size: int, *, trains: bool) -> Unit:
    adapters = lora.rank * adapted_widths(lora, shape)
    quantised = linear_weights(shape) if lora.is_quantised else 0
    sharded = shape.layer - quantised
    return Unit(
        trained=adapters if trains else 0,
        frozen=size * (sharded if trains else sharded + adapters),
        whole=quantised * BASE_BYTES[lora.base],
        gathered=size * (adapters + sharded),
        dequantised=size * quantised,
    )


def linear_weights(shape: ModelShape) -> int:
    """Returns the weights in a layer's linear layers, all that bitsandbytes quantises.

    Routers and fused experts are parameters of other modules in transformers.
    """
    return shape.layer_matmuls - shape.experts * shape.hidden * (1 + shape.matrices * shape.intermediate)


def adapted_widths(lora: LoraConfig, shape: ModelShape) -> int:
    """Returns the inputs and outputs of a layer's adapted matrices, 0 for those of unknown names."""
    widths = _widths(shape)
    return sum(widths.get(name, 0) for name in _adapted(lora, shape))


def refuse_unknown_layers(lora: LoraConfig, shape: ModelShape) -> None:
    """Raises ConfigError for adapted layers whose widths are not known."""
    widths = _widths(shape)
    if unknown := sorted(name for name in _adapted(lora, shape) if not widths.get(name)):
        raise ConfigError(
            f"train.lora.target_modules: plan does not know the widths of {', '.join(unknown)}; the layers of "
            f"such a model are {', '.join(name for name in shape.linear if widths[name])}"
        )


def _adapted(lora: LoraConfig, shape: ModelShape) -> set[str]:
    if not isinstance(lora.target_modules, str):
        return {_of_every_layer(name) for name in lora.target_modules}
    widths = _widths(shape)
    return {name for name in (*shape.linear, "shared_expert_gate") if widths[name]}


def _of_every_layer(target: str) -> str:
    """Returns the last part of a name, or the whole name if it numbers a layer."""
    *parts, last = target.split(".")
    return target if any(part.isdigit() for part in parts) else last


def _widths(shape: ModelShape) -> dict[str, int]:
    """Returns inputs and outputs of linear layers by their names in many families. PEFT adapts no fused experts."""
    kv, inner = shape.kv_heads * shape.head_dim, shape.shared if shape.experts else shape.intermediate
    return {
        "q_proj": shape.hidden + shape.q, "k_proj": shape.hidden + kv, "v_proj": shape.hidden + kv,
        **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "W_pack", "wqkv"), shape.hidden + shape.q + 2 * kv),
        **dict.fromkeys(("o_proj", "out_proj", "dense", "wo"), shape.q + shape.hidden),
        "gate_up_proj": shape.hidden + 2 * inner if inner else 0,
        **dict.fromkeys(_FEED_FORWARD, shape.hidden + inner if inner else 0),
        "shared_expert_gate": shape.hidden + 1 if shape.shared else 0,
    }  # fmt: skip


_FEED_FORWARD = (
    "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h", "w1", "w2",
    "w3",
)  # fmt: skip


def dtype_bytes(config: SpinConfig) -> int:
    """Returns the bytes of a number in the computation."""
    return 2 if config.train.precision == "bf16" else 4
