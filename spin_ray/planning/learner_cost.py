"""Time and memory of scoring, training and evaluation.

``h`` is the hidden width, ``q`` that of all heads, ``i`` the feed-forward network's.
"""

from dataclasses import replace

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.planning.hardware import Hardware
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.rates import at_measured_rate
from spin_ray.planning.stage_cost import RUNTIME, StageCost
from spin_ray.planning.work import Packs, Work, heldout_packs

WORKERS_START_S = 20.0
"""Seen on two CPU cores with small models: 16 to 22 s."""
CHUNK_TARGETS = {"cpu": 256, "cuda": 4096}
"""Copy of ``learner.head.ROWS_PER_CHUNK``: an import would bring torch."""
FILLED = 0.75
"""Part of a device that training may fill without checkpointing: packs were measured to take up to 1.3 times what is
predicted (``benchmarks/plan_check.py``)."""
MOMENTS = {"rmsprop": 1, "adamw": 2}
"""fp32 numbers that an optimizer keeps per parameter."""


# Stages


def scoring_cost(config: SpinConfig, shape: ModelShape, device: Hardware, packs: Packs) -> StageCost:
    """Returns the cost of the reference, a forward pass over an epoch."""
    return _learner_cost("scoring", config, shape, device, packs, passes=1, optimizer=config.train.optimizer)


def evaluation_cost(config: SpinConfig, shape: ModelShape, device: Hardware, work: Work) -> StageCost:
    packs = heldout_packs(config, work)
    cost = _learner_cost("evaluation", config, shape, device, packs, passes=2, optimizer=None)
    return _with_start(cost)


def training_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, packs: Packs, epochs: int, optimizer: OptimizerConfig
) -> StageCost:
    config = settle_checkpointing(config, shape, device.memory, optimizer)
    cost = _learner_cost("training", config, shape, device, packs, passes=epochs, optimizer=optimizer, backward=True)
    return _with_start(cost)


def _with_start(cost: StageCost) -> StageCost:
    bound = cost.bound if cost.seconds > WORKERS_START_S else "start of workers"
    return replace(cost, seconds=cost.seconds + WORKERS_START_S, bound=bound)


def _learner_cost(
    name: str,
    config: SpinConfig,
    shape: ModelShape,
    device: Hardware,
    packs: Packs,
    *,
    passes: int,
    optimizer: OptimizerConfig | None,
    backward: bool = False,
) -> StageCost:
    flops = pack_flops(config, shape, packs.length, packs.targets, backward=backward)
    device = at_measured_rate(device, "training" if backward else "scoring", shape.parameters, config.train.precision)
    compute = device.seconds(packs.per_rank * flops, config.train.precision)
    traffic = device.sending(step_traffic(config, shape, packs.per_rank, backward=backward))
    return StageCost(
        name=name,
        tokens=passes * packs.tokens,
        flops=passes * packs.steps * packs.per_step * flops,
        seconds=passes * packs.steps * max(compute, traffic),
        bound="gathering weights" if traffic > compute else "compute",
        memory=learner_memory(config, shape, packs, optimizer=optimizer, backward=backward),
        room=device.memory,
    )


# FLOPs and traffic


def pack_flops(config: SpinConfig, shape: ModelShape, length: float, targets: float, *, backward: bool) -> float:
    """Returns the FLOPs of a pack of ``length`` tokens with ``targets`` response tokens.

    The dense mask computes all length² pairs. With backward a pass costs 3 times as much, or 4 where activations are
    computed again.
    """
    trunk, head = shape.trunk_flops(length, length**2), shape.head_flops(targets)
    if not backward:
        return trunk + head
    return (4 if config.train.gradient_checkpointing is True else 3) * trunk + 4 * head


def step_traffic(config: SpinConfig, shape: ModelShape, packs: float, *, backward: bool) -> float:
    """Returns the bytes that a rank receives in a step: weights in the computation's type, fp32 gradients."""
    train = config.train
    passes = packs * (2 if backward else 1) if train.sharding == "full" else 1
    reduced = (packs if train.reduces_every_pack else 1) if backward else 0
    gathered = passes * _dtype_bytes(config) + 4 * reduced
    return shape.parameters * gathered * (train.workers - 1) / train.workers


# Memory


def settle_checkpointing(config: SpinConfig, shape: ModelShape, room: float, optimizer: OptimizerConfig) -> SpinConfig:
    """Returns the recipe with ``gradient_checkpointing: auto`` decided for devices of ``room`` bytes.

    Full packs are counted, whatever the data: the decision is the plan's and the workers' alike.
    """
    if config.train.gradient_checkpointing != "auto":
        return config
    length = config.train.pack_length
    full = Packs(
        steps=1, per_step=2, per_rank=2, length=length, targets=length, per_rank_at_most=2, tokens=2 * length
    )  # fmt: skip
    plain = _with_checkpointing(config, on=False)
    needed = sum(learner_memory(plain, shape, full, optimizer=optimizer, backward=True).values())
    return _with_checkpointing(config, on=bool(config.train.resources.gpus) and needed > FILLED * room)


def _with_checkpointing(config: SpinConfig, *, on: bool) -> SpinConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": on})})


def learner_memory(
    config: SpinConfig, shape: ModelShape, packs: Packs, *, optimizer: OptimizerConfig | None, backward: bool
) -> dict[str, float]:
    """Returns the bytes of one rank by purpose.

    States are fp32 and sharded. Per parameter: 4 for the weight, 4 for its gradient, 4 (RMSProp) or 8 (AdamW) for the
    optimizer. A rank with several packs a step also keeps whole gradients, unless they are reduced with every pack.
    """
    on_host = config.train.offload and config.train.resources.gpus
    sharded = 0 if on_host else shape.parameters / config.train.workers
    moments = MOMENTS.get(optimizer.name, max(MOMENTS.values())) if optimizer else 0
    memory = {"weights": 4 * sharded, "optimizer": 4 * moments * sharded}
    if backward:
        memory |= {"gradients": 4 * sharded}
        accumulates = packs.per_rank_at_most > 1 and not config.train.reduces_every_pack
        memory |= {"whole gradients": 4.0 * shape.parameters if accumulates else 0.0}
    memory |= {
        "gathered weights": _gathered_bytes(config, shape, backward=backward),
        "activations": _activation_bytes(config, shape, packs, backward=backward),
        "runtime": RUNTIME,
    }
    return {purpose: count for purpose, count in memory.items() if count}


def _gathered_bytes(config: SpinConfig, shape: ModelShape, *, backward: bool) -> float:
    """Returns the bytes of gathered weights and of two fp32 buffers for gradients.

    Resharded layers: two of them and the root are there; otherwise all.
    """
    resharded = config.train.sharding == "full" and config.train.workers > 1
    weights = shape.root + 2 * shape.layer if resharded else shape.parameters
    buffers = 2 * 4 * max(shape.root, shape.layer) if backward and config.train.workers > 1 else 0
    return _dtype_bytes(config) * weights + buffers


def _activation_bytes(config: SpinConfig, shape: ModelShape, packs: Packs, *, backward: bool) -> float:
    """Returns the bytes that one pack keeps.

    A layer keeps per token, at b bytes a number: 2h(4 + 2b) for two norms, 4qb for attention, 4ib for the feed-forward
    network. Counted as in arXiv 2205.05198.
    """
    length, b = config.train.pack_length, _dtype_bytes(config)
    layer = length * (2 * shape.hidden * (4 + 2 * b) + 4 * shape.q * b + 4 * shape.intermediate * b)
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


def _dtype_bytes(config: SpinConfig) -> int:
    return 2 if config.train.precision == "bf16" else 4
