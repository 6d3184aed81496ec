"""Memory of scoring, training and evaluation, and the choices that follow from it.

``h`` is the hidden width, ``q`` that of all heads, ``i`` the feed-forward network's.
"""

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.planning.mesh import Mesh, Ranks, choose_mesh, flat
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import RUNTIME
from spin_ray.planning.weights import dtype_bytes, weights_of
from spin_ray.planning.work import Packs

CHUNK_TARGETS = {"cpu": 256, "cuda": 4096}
"""Copy of ``learner.head.ROWS_PER_CHUNK``: an import would bring torch."""
FILLED = 0.75
"""Part of a device that training may fill without checkpointing: packs were measured to take up to 1.3 times what is
predicted (``benchmarks/plan_check.py``)."""
MOMENTS = {"rmsprop": 1.0, "adamw": 2.0, "adamw_8bit": 0.5, "muon": 1.0}
"""Fp32 numbers that an optimizer keeps per parameter; those of 8 bits count a quarter."""


def settle_checkpointing(
    config: SpinConfig, shape: ModelShape, room: float, optimizer: OptimizerConfig, ranks: Ranks | None = None
) -> SpinConfig:
    """Returns the recipe with ``gradient_checkpointing: auto`` decided for devices of ``room`` bytes.

    Full packs are counted, whatever the data: the decision is the plan's and the workers' alike.
    """
    if config.train.gradient_checkpointing != "auto":
        return config
    plain = _with_checkpointing(config, on=False)
    needed = sum(_full_memory(plain, shape, optimizer, ranks).values())
    return _with_checkpointing(config, on=bool(config.train.resources.gpus) and needed > FILLED * room)


def settle_mesh(
    config: SpinConfig, shape: ModelShape, room: float, optimizer: OptimizerConfig, per_node: int
) -> tuple[Ranks, str]:
    """Returns the mesh of ``train.mesh: auto`` on devices of ``room`` bytes, and why."""
    if config.train.gradient_checkpointing == "auto":
        config = _with_checkpointing(config, on=True)

    def fits(mesh: Mesh) -> bool:
        ranks = Ranks(mesh=mesh, per_node=per_node)
        return sum(_full_memory(config, shape, optimizer, ranks).values()) <= FILLED * room

    mesh, why = choose_mesh(config.train.workers, per_node, fits)
    return Ranks(mesh=mesh, per_node=per_node), why


def _full_memory(
    config: SpinConfig, shape: ModelShape, optimizer: OptimizerConfig, ranks: Ranks | None
) -> dict[str, float]:
    length = config.train.pack_length
    full = Packs(
        steps=1, per_step=2, per_rank=2, length=length, targets=length, per_rank_at_most=2, tokens=2 * length
    )  # fmt: skip
    return learner_memory(config, shape, full, optimizer=optimizer, backward=True, ranks=ranks)


def _with_checkpointing(config: SpinConfig, *, on: bool) -> SpinConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": on})})


def learner_memory(
    config: SpinConfig,
    shape: ModelShape,
    packs: Packs,
    *,
    optimizer: OptimizerConfig | None,
    backward: bool,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Returns the bytes of one rank by purpose.

    States are fp32 and sharded. Per trained parameter: 4 for the weight, 4 for its gradient, and the optimizer's. What
    is frozen has neither. A rank with several packs a step also keeps whole gradients, unless they are reduced with
    every pack.
    """
    mesh = (ranks or flat(config.train.workers)).mesh
    weights = weights_of(config, shape, trains=optimizer is not None)
    on_host = config.train.offload and config.train.resources.gpus
    trained = 0.0 if on_host else weights.trained / mesh.parts
    moments = MOMENTS.get(optimizer.name, max(MOMENTS.values())) if optimizer else 0
    memory = {
        "weights": 4 * trained + (0.0 if on_host else weights.frozen / mesh.parts), "optimizer": 4 * moments * trained,
    }  # fmt: skip
    if backward:
        memory |= {"gradients": 4 * trained}
        accumulates = packs.per_rank_at_most > 1 and not config.train.reduces_every_pack
        memory |= {"whole gradients": 4.0 * weights.trained / mesh.tensor if accumulates else 0.0}
    memory |= {
        "gathered weights": _gathered_bytes(config, shape, mesh, trains=optimizer is not None, backward=backward),
        "activations": _activation_bytes(config, shape, packs, mesh, backward=backward),
        "runtime": RUNTIME,
    }
    return {purpose: count for purpose, count in memory.items() if count}


def _gathered_bytes(config: SpinConfig, shape: ModelShape, mesh: Mesh, *, trains: bool, backward: bool) -> float:
    """Returns the bytes of gathered weights and of two fp32 buffers for gradients.

    Resharded layers: two of them and the root are there; otherwise all.
    """
    weights = weights_of(config, shape, trains=trains)
    resharded = config.train.sharding == "full" and mesh.shard > 1
    layers = 2 if resharded else weights.layers
    gathered = weights.root.computed + layers * weights.layer.computed
    summed = 2 * 4 * max(weights.root.trained, weights.layer.trained) if backward and mesh.ranks > 1 else 0.0
    return (gathered + summed) / mesh.tensor


def _activation_bytes(config: SpinConfig, shape: ModelShape, packs: Packs, mesh: Mesh, *, backward: bool) -> float:
    """Returns the bytes that one pack keeps.

    A layer keeps per token, at b bytes a number: 2h(4 + 2b) for two norms, 4qb for attention, 4ib for the feed-forward
    network, which a tensor group divides. Counted as in arXiv 2205.05198. Of experts a token keeps the active ones'.
    """
    length, b = config.train.pack_length, dtype_bytes(config)
    wide = shape.active * shape.intermediate + shape.shared if shape.experts else shape.intermediate
    layer = length * (2 * shape.hidden * (4 + 2 * b) + (4 * shape.q * b + 4 * wide * b) / mesh.tensor)
    inputs = length * shape.hidden * b
    if not backward:
        kept = float(layer)
    elif config.train.gradient_checkpointing is True:
        kept = float(shape.layers * inputs + layer)
    else:
        kept = float(shape.layers * layer)
    on_gpu = bool(config.train.resources.gpus)
    mask = 0 if on_gpu else length**2 * (b + 1)  # the additive mask, and the booleans it is made from
    rows = min(CHUNK_TARGETS["cuda"], length) if on_gpu else CHUNK_TARGETS["cpu"]
    logits = rows * shape.vocab * (3 * 4 if backward else 4)  # fp32; with gradient and softmax
    return kept + packs.targets * shape.hidden * b + mask + logits
