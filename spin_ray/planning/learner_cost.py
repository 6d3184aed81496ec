"""Time of scoring, training and evaluation."""

from dataclasses import replace

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, CPU, Hardware
from spin_ray.planning.learner_memory import MOMENTS, learner_memory, settle_checkpointing
from spin_ray.planning.mesh import Ranks, flat
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.rates import at_measured_rate
from spin_ray.planning.stage_cost import StageCost
from spin_ray.planning.traffic import step_collectives, step_time
from spin_ray.planning.weights import weights_of
from spin_ray.planning.work import Packs, Work, heldout_packs

WORKERS_START_S = 20.0
"""Seen on two CPU cores with small models: 16 to 22 s."""


# Stages


def scoring_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, packs: Packs, ranks: Ranks | None = None
) -> StageCost:
    """Returns the cost of the reference, a forward pass over an epoch."""
    return _learner_cost("scoring", config, shape, device, packs, ranks, passes=1, optimizer=config.train.optimizer)


def evaluation_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, work: Work, ranks: Ranks | None = None
) -> StageCost:
    packs = heldout_packs(config, work, ranks.mesh.readers if ranks else None)
    whole = config.model_copy(update={"train": config.train.model_copy(update={"lora": None})})  # iterates are merged
    cost = _learner_cost("evaluation", whole, shape, device, packs, ranks, passes=2, optimizer=None)
    return _with_start(cost)


def training_cost(
    config: SpinConfig,
    shape: ModelShape,
    device: Hardware,
    packs: Packs,
    epochs: int,
    optimizer: OptimizerConfig,
    ranks: Ranks | None = None,
) -> StageCost:
    config = settle_checkpointing(config, shape, device.memory, optimizer, ranks)
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
    ranks: Ranks | None,
    *,
    passes: int,
    optimizer: OptimizerConfig | None,
    backward: bool = False,
) -> StageCost:
    ranks = ranks or flat(config.train.workers)
    device = at_measured_rate(device, "training" if backward else "scoring", shape.parameters, config.train.precision)
    each, forward = (
        pack_flops(config, shape, packs.length, packs.targets, backward=both) for both in (backward, False)
    )

    def computing(flops: float) -> float:
        share = packs.per_rank * packs.slowest * flops / ranks.mesh.tensor
        return device.seconds(share, config.train.precision)

    collectives = step_collectives(config, shape, ranks, packs.per_rank, packs.length, backward=backward)
    step = step_time(collectives, device, {"forward": computing(forward), "backward": computing(each - forward)})
    host = _host_step_s(config, shape, ranks, optimizer) if backward and optimizer else 0.0
    return StageCost(
        name=name,
        tokens=passes * packs.tokens,
        flops=passes * packs.steps * packs.per_step * each,
        seconds=passes * packs.steps * (step.seconds + host),
        bound="optimizer on CPUs" if host > step.seconds else step.bound,
        memory=learner_memory(config, shape, packs, optimizer=optimizer, backward=backward, ranks=ranks),
        room=device.memory,
        sent={kind: passes * packs.steps * sent for kind, sent in step.sent.items()},
    )


def _host_step_s(config: SpinConfig, shape: ModelShape, ranks: Ranks, optimizer: OptimizerConfig) -> float:
    """Returns the seconds of an offloaded optimizer: weights, gradients and moments read, all but gradients written."""
    if not (config.train.offload and config.train.resources.gpus):
        return 0.0
    numbers = 3 + 2 * MOMENTS.get(optimizer.name, max(MOMENTS.values()))
    moved = 4 * numbers * weights_of(config, shape).trained / ranks.mesh.parts
    return moved / (CPU.bandwidth * config.train.resources.threads * BANDWIDTH_EFFICIENCY)


# FLOPs and traffic


def pack_flops(config: SpinConfig, shape: ModelShape, length: float, targets: float, *, backward: bool) -> float:
    """Returns the FLOPs of a pack of ``length`` tokens with ``targets`` response tokens.

    The dense mask computes all length² pairs. Backward costs 2 forward passes, and 1 without gradients of frozen
    weights; activations that are computed again cost 1 more. The head is always computed again.
    """
    trunk, head = shape.trunk_flops(length, length**2), shape.head_flops(targets)
    if not backward:
        return trunk + head
    passes = 2 if config.train.lora else 3
    return (passes + (config.train.gradient_checkpointing is True)) * trunk + (passes + 1) * head


def step_traffic(
    config: SpinConfig, shape: ModelShape, packs: float, *, backward: bool, ranks: Ranks | None = None
) -> float:
    """Returns the bytes of weights and gradients that a rank sends in a step, and as many it receives."""
    ranks = ranks or flat(config.train.workers)
    return sum(it.sent for it in step_collectives(config, shape, ranks, packs, 0.0, backward=backward))
