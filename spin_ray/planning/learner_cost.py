"""Time and memory of scoring, training and evaluation."""

from dataclasses import replace
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, OptimizerConfig
from spin_ray.learner.sizes import MOMENTS, ROWS_PER_CHUNK
from spin_ray.planning.groups import Ranks
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, CPU, GB, Hardware
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.rates import at_measured_rate
from spin_ray.planning.stage_cost import RUNTIME, StageCost, summed
from spin_ray.planning.traffic import step_collectives, step_time
from spin_ray.planning.weights import Weights, dtype_bytes, weights_of
from spin_ray.planning.work import Packs, Work, heldout_packs

WORKERS_START_S = 20.0
"""Seconds to start train workers, seen on two CPU cores."""
FILLED = 0.75
"""Share of a device that training may fill without checkpointing. Packs were measured to take up to 1.3 times the
prediction (``benchmarks/plan_check.py``)."""
MOMENTS_OF_8_BIT = 2 / 4
"""Fp32 numbers per parameter that AdamW's two moments take in 8 bits."""
ZERO_3_BUCKET = 4 * 500_000_000
"""Bytes of the buffer that ZeRO-3 allocates for gradients of any model: ``reduce_bucket_size`` fp32 numbers."""


# Stages


def scoring_cost(config: SpinConfig, shape: ModelShape, device: Hardware, packs: Packs, ranks: Ranks) -> StageCost:
    """Returns the cost of a forward pass over an epoch: of the reference, or of a teacher."""
    return _learner_cost("scoring", config, shape, device, packs, ranks, passes=1, optimizer=config.train.optimizer)


def evaluation_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, work: Work, iterate: int, ranks: Ranks
) -> StageCost:
    """Returns the cost of scoring samples of θ_iterate and its opponent under both, and the former under θ_0.

    θ_0 is the opponent of θ_1 itself. Iterates are whole models, or adapters on the base in its number format.
    """
    scoring = config if config.commits_adapters else config.with_train(lora=None)

    def scored(samples: int, passes: int) -> StageCost:
        packs = heldout_packs(config, work, samples, ranks.mesh.data_ranks)
        return _learner_cost("evaluation", scoring, shape, device, packs, ranks, passes=passes, optimizer=None)

    under_both = scored(samples=2, passes=2)
    return _with_start(summed([under_both, scored(samples=1, passes=1)]) if iterate > 1 else under_both)


def training_cost(
    config: SpinConfig,
    shape: ModelShape,
    device: Hardware,
    packs: Packs,
    epochs: int,
    optimizer: OptimizerConfig,
    ranks: Ranks,
) -> StageCost:
    config = settle_checkpointing(config, shape, device.memory, optimizer, ranks.mesh)
    cost = _learner_cost(
        "training", config, shape, device, packs, ranks, passes=epochs, optimizer=optimizer, backward=True
    )
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
    ranks: Ranks,
    *,
    passes: int,
    optimizer: OptimizerConfig | None,
    backward: bool = False,
) -> StageCost:
    stage = "training" if backward else "scoring"
    measured = at_measured_rate(device, stage, shape.parameters, config.train.precision)
    count, device = (_needed_by_pack, measured) if measured else (_computed_by_pack, device)
    mine = shape.split(ranks.mesh.tensor)
    each, forward = (count(config, mine, packs, backward=both) for both in (backward, False))

    def computing(flops: float) -> float:
        return device.seconds(packs.per_rank * packs.slowest * flops, config.train.precision)

    collectives = step_collectives(config, shape, ranks, packs.per_rank, packs.length, backward=backward)
    step = step_time(collectives, device, {"forward": computing(forward), "backward": computing(each - forward)})
    host = _host_step_s(config, mine, ranks, optimizer) if backward and optimizer else 0.0
    useful = count(config, shape, packs, backward=backward)
    working = learner_memory(config, shape, packs, optimizer=optimizer, backward=backward, mesh=ranks.mesh)
    loading = _loading_memory(config, shape, trains=optimizer is not None)
    return StageCost(
        name=name,
        tokens=passes * packs.tokens,
        flops=passes * packs.steps * packs.per_step * useful,
        seconds=passes * packs.steps * (step.seconds + host),
        bound="optimizer on CPUs" if host > step.seconds else step.bound,
        memory=max(working, loading, key=lambda memory: sum(memory.values())),
        room=device.memory,
        sent={kind: passes * packs.steps * sent for kind, sent in step.sent.items()},
    )


def moments_of(optimizer: OptimizerConfig) -> float:
    """Returns the fp32 numbers that the optimizer keeps per parameter; the most for one from outside."""
    if optimizer.name == "adamw_8bit":
        return MOMENTS_OF_8_BIT
    return len(MOMENTS.get(optimizer.name, max(MOMENTS.values(), key=len)))


def _host_step_s(config: SpinConfig, shape: ModelShape, ranks: Ranks, optimizer: OptimizerConfig) -> float:
    """Returns the seconds of an offloaded optimizer, which reads weights, gradients and moments and writes all but
    gradients.
    """
    if not (config.train.offload and config.train.resources.gpus):
        return 0.0
    numbers = 3 + 2 * moments_of(optimizer)
    moved = 4 * numbers * weights_of(config, shape).trained / ranks.mesh.shard
    return moved / (CPU.bandwidth * config.train.resources.threads * BANDWIDTH_EFFICIENCY)


# FLOPs and traffic


def pack_flops(
    config: SpinConfig, shape: ModelShape, length: float, targets: float, attended: float, *, backward: bool
) -> float:
    """Returns the FLOPs of a pack of ``length`` tokens with ``targets`` response tokens.

    Backward costs 2 forward passes, or 1 if the weights are frozen. Checkpointing costs 1 more; the head is always
    recomputed.

    Args:
        attended: pairs of tokens that attention multiplies.
    """
    trunk, head = shape.trunk_flops(length, attended), shape.head_flops(targets)
    if not backward:
        return trunk + head
    passes = 2 if config.train.lora else 3
    return (passes + (config.train.gradient_checkpointing is True)) * trunk + (passes + 1) * head


def _computed_by_pack(config: SpinConfig, shape: ModelShape, packs: Packs, *, backward: bool) -> float:
    """Returns the FLOPs of a pack with those of its padding.

    Kernels on GPUs skip pairs of tokens that do not see each other, but for some in blocks at the border. On CPUs each
    tree is a whole product (``learner.attention``).
    """
    attended = packs.visible if config.train.resources.gpus else packs.together
    return pack_flops(config, shape, packs.length, packs.targets, attended, backward=backward)


def _needed_by_pack(config: SpinConfig, shape: ModelShape, packs: Packs, *, backward: bool) -> float:
    """Returns the FLOPs to which a measured rate applies, and those of checkpointing, which the benchmark does not."""
    tokens = packs.tokens / (packs.steps * packs.per_step)
    frozen = config.train.lora is not None
    needed = needed_flops(shape, tokens, packs.targets, packs.visible, backward=backward, frozen=frozen)
    again = backward and config.train.gradient_checkpointing is True
    return needed + (shape.trunk_flops(tokens, packs.visible) if again else 0.0)


def needed_flops(
    shape: ModelShape, tokens: float, targets: float, visible: float, *, backward: bool, frozen: bool = False
) -> float:
    """Returns the FLOPs that trees need, without padding, unseen pairs of tokens and what is computed again.

    ``benchmarks/gpu_steps`` divides them by the measured time. Backward costs 2 forward passes, or 1 if the weights are
    frozen.
    """
    passes = (2 if frozen else 3) if backward else 1
    return passes * (shape.trunk_flops(tokens, visible) + shape.head_flops(targets))


# Memory


def settle_checkpointing(
    config: SpinConfig, shape: ModelShape, room: float, optimizer: OptimizerConfig, mesh: Mesh
) -> SpinConfig:
    """Decides ``gradient_checkpointing: auto`` for devices of ``room`` bytes.

    Counts full packs, which are known before the rows are. The plan takes the memory of a data sheet and a worker that
    of its driver, 80.0 and 84.9 GB of an H100. Near the limit, workers may keep what the plan computes again.
    """
    if config.train.gradient_checkpointing != "auto":
        return config
    needed = sum(full_memory(config.with_train(gradient_checkpointing=False), shape, optimizer, mesh).values())
    on = bool(config.train.resources.gpus) and needed > FILLED * room
    return config.with_train(gradient_checkpointing=on)


def full_memory(config: SpinConfig, shape: ModelShape, optimizer: OptimizerConfig, mesh: Mesh) -> dict[str, float]:
    """Returns the bytes by purpose of a rank that trains full packs."""
    length = config.train.pack_length
    full = Packs(
        steps=1, per_step=2, per_rank=2, length=length, targets=length, per_rank_at_most=2, tokens=2 * length
    )  # fmt: skip
    return learner_memory(config, shape, full, optimizer=optimizer, backward=True, mesh=mesh)


def learner_memory(
    config: SpinConfig,
    shape: ModelShape,
    packs: Packs,
    *,
    optimizer: OptimizerConfig | None,
    backward: bool,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Returns the bytes of one rank by purpose.

    States are fp32 and sharded: weight, gradient and moments of each trained parameter. ZeRO-3 also keeps the shard in
    the format of the computation. A rank with several packs a step also keeps whole gradients, unless it reduces them
    with every pack.

    Args:
        shape: the whole model's, also with a tensor group.
        mesh: default: one copy over all workers.
    """
    mesh = mesh or Mesh(shard=config.train.workers)
    shape = shape.split(mesh.tensor)
    weights = weights_of(config, shape, trains=optimizer is not None)
    on_host = config.train.offload and config.train.resources.gpus
    trained = 0.0 if on_host else weights.trained / mesh.shard
    moments = moments_of(optimizer) if optimizer else 0
    frozen = weights.whole + (0.0 if on_host else weights.frozen / mesh.shard)
    zero_3 = optimizer is not None and _is_zero_3(config)
    copied = dtype_bytes(config) * trained if zero_3 else 0.0
    memory = {"weights": 4 * trained + copied + frozen, "optimizer": 4 * moments * trained}
    memory |= {"gradient bucket": float(ZERO_3_BUCKET) if zero_3 else 0.0}
    if backward:
        memory |= {"gradients": 4 * trained}
        accumulates = packs.per_rank_at_most > 1 and not config.train.reduces_every_pack
        memory |= {"whole gradients": 4.0 * weights.trained if accumulates else 0.0}
        if on_host and mesh.replicate > 1 and packs.per_rank_at_most > 1 and config.train.reduces_every_pack:
            memory |= {"gradients": 4 * weights.trained / mesh.shard}  # summed on the GPU until the last pack
    gathered = _gathered_bytes(config, weights, mesh, trains=optimizer is not None)
    activations = _activation_bytes(config, shape, packs, backward=backward)
    if backward and mesh.ranks > 1:
        gathered += _summed_bytes(config, shape, weights)
    elif backward and config.train.backend != "deepspeed":
        summed, activations = _summed_alone(config, shape, weights, packs, activations)
        gathered += summed
    memory |= {"gathered weights": gathered, "activations": activations, "runtime": RUNTIME}
    return {purpose: count for purpose, count in memory.items() if count}


def most_offloaded_bytes(config: SpinConfig, shape: ModelShape, mesh: Mesh) -> float:
    """Returns ``offloaded_bytes`` of the warm-up or of SPIN, whichever keeps more."""
    trainings = [(config, config.train.optimizer)]
    if config.sft:
        trainings.append((config.with_train(lora=None), config.sft.optimizer))
    return max(offloaded_bytes(recipe, shape, optimizer, mesh) for recipe, optimizer in trainings)


def offloaded_bytes(config: SpinConfig, shape: ModelShape, optimizer: OptimizerConfig, mesh: Mesh) -> float:
    """Returns the bytes that a rank with ``train.offload`` keeps in its node's memory while it trains.

    These are the fp32 states and the frozen weights of its shard, and ZeRO-3's copy to compute with. Quantised weights
    stay on the device.
    """
    weights = weights_of(config, shape.split(mesh.tensor))
    copied = dtype_bytes(config) if _is_zero_3(config) else 0
    return ((4 * (2 + moments_of(optimizer)) + copied) * weights.trained + weights.frozen) / mesh.shard


def offload_warning(config: SpinConfig, trained: float, packs: float, mesh: Mesh) -> str | None:
    """Returns a warning if FSDP2 adds up gradients of several packs on the CPUs; None if it does not.

    A later pack's gradients are copied to pageable memory, and the GPU waits for copies and additions (torch 2.13,
    ``foreach_reduce``).

    Args:
        trained: parameters of the whole model that are trained.
        packs: of a rank in a step.
    """
    train = config.train
    moved = 4 * trained / mesh.shard / mesh.tensor
    if not (train.offload and train.resources.gpus and train.reduces_every_pack) or train.backend == "deepspeed":
        return None
    if packs <= 1 or moved < GB or mesh.replicate > 1:  # between copies, sums stay on the GPU until the last pack
        return None
    return (
        f"train.offload: of each pack of a step but the first, {moved / GB:.1f} GB of gradients are copied to the "
        f"node's memory and added by its CPUs, while the GPU waits; set a train.pack_length that holds a worker's rows "
        f"of a step (now in about {ceil(packs)} packs), or train adapters (train.lora)"
    )


def _loading_memory(config: SpinConfig, shape: ModelShape, *, trains: bool) -> dict[str, float]:
    """Returns the bytes by purpose of a rank that loads a quantised base; nothing for others, which load shards.

    ``learner.quantised`` puts the whole model onto each device. What is not quantised is sharded after that.
    """
    lora = config.train.lora
    if lora is None or not lora.is_quantised:
        return {}
    weights = weights_of(config, shape, trains=trains)
    return {"whole base while loading": weights.whole + weights.frozen, "runtime": RUNTIME}


def _gathered_bytes(config: SpinConfig, weights: Weights, mesh: Mesh, *, trains: bool) -> float:
    """Returns the bytes of gathered weights.

    Resharding keeps the root and two layers at once. A single worker also copies its weights to compute. Products
    dequantise their own weights, here those of one layer at once.
    """
    frozen = config.train.lora is not None if trains else bool(config.train.resources.gpus)
    resharded = config.train.sharding == "full" and (mesh.shard > 1 or frozen)
    layers = 2 if resharded else weights.layers
    return weights.root.gathered + layers * weights.layer.gathered + weights.layer.dequantised


def _summed_bytes(config: SpinConfig, shape: ModelShape, weights: Weights) -> float:
    """Returns the bytes of fp32 buffers in which ranks sum gradients.

    FSDP2 holds the largest unit twice. ZeRO-3 holds a copy of its full bucket, or of one larger matrix
    (``coalesced_collectives``).
    """
    if not _is_zero_3(config):
        return 2 * 4 * max(weights.root.trained, weights.layer.trained)
    matrix = shape.hidden * max(shape.vocab, 2 * shape.experts * shape.intermediate) if weights.root.trained else 0
    return max(4.0 * matrix, min(ZERO_3_BUCKET, 4.0 * weights.trained))


def _summed_alone(
    config: SpinConfig, shape: ModelShape, weights: Weights, packs: Packs, activations: float
) -> tuple[float, float]:
    """Returns the bytes of gradients beside the summed ones, and of activations then, of an only rank with FSDP2.

    Without another rank, too, a unit's gradients are copied into two fp32 buffers, of which a step's first pack keeps
    the second as its gradient (torch 2.13, ``foreach_reduce``). Layers are summed beside the activations and the head's
    gradient in the format of the computation, the root after both.
    """
    if packs.per_rank_at_most > 1 and not config.train.reduces_every_pack:
        return 0.0, activations  # whole gradients are counted, and are gone when the summed ones are there
    kept = packs.per_rank_at_most == 1 and not (config.train.offload and config.train.resources.gpus)
    copies = 1 if kept else 2
    head = dtype_bytes(config) * shape.hidden * shape.vocab if weights.root.trained else 0
    beside = max(0.0, copies * 4 * weights.layer.trained + head - (4 * weights.root.trained if kept else 0))
    alone = copies * 4 * weights.root.trained
    return (beside, activations) if beside + activations >= alone else (alone, 0.0)


def _is_zero_3(config: SpinConfig) -> bool:
    return config.train.backend == "deepspeed" and config.train.sharding == "full"


def _activation_bytes(config: SpinConfig, shape: ModelShape, packs: Packs, *, backward: bool) -> float:
    """Returns the bytes that one pack keeps, counted as in arXiv 2205.05198.

    A layer keeps activations of two norms, attention and the feed-forward network. Only active and shared experts
    count.
    """
    length, b = config.train.pack_length, dtype_bytes(config)
    wide = shape.active * shape.intermediate + shape.shared if shape.experts else shape.intermediate
    layer = length * (2 * shape.hidden * (4 + 2 * b) + 4 * shape.q * b + 4 * wide * b)
    inputs = length * shape.hidden * b
    if not backward:
        kept = float(layer)
    elif config.train.gradient_checkpointing is True:
        kept = float(shape.layers * inputs + layer)
    else:
        kept = float(shape.layers * layer)
    on_gpu = bool(config.train.resources.gpus)
    mask = 0 if on_gpu else length**2 * (b + 1)  # the additive mask, and the booleans that make it
    rows = min(ROWS_PER_CHUNK["cuda"], length) if on_gpu else ROWS_PER_CHUNK["cpu"]
    logits = rows * shape.vocab * (3 * 4 if backward else 4)  # fp32; backward also holds the gradient and the softmax
    return kept + packs.targets * shape.hidden * b + mask + logits
