"""Bytes that a rank sends in an optimizer step, and their time.

Collectives are rings. To gather or scatter S bytes over n ranks, each sends S·(n−1)/n; to sum on every rank, twice
that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.groups import Group, Ranks
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, Hardware
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.weights import dtype_bytes, weights_of

CALL_S, HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 14.0e-6
"""Seconds of a call, a hop on NVLink and a hop between nodes: NCCL's for rings (src/graph/tuning.cc, 2.19)."""

Phase = Literal["forward", "backward"]
BOUNDS = {
    "weights": "gathering weights", "gradients": "gathering weights", "replicas": "summing gradients over replicas",
    "activations": "activations of tensor groups", "host": "copies to host memory",
}  # fmt: skip
"""Names in the table. Weights and gradients share one, because the same ranks gather and scatter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """All collectives of one kind in a step."""

    name: str
    """Key of ``BOUNDS``."""
    phase: Phase
    group: Group
    sent: float
    """Bytes per rank."""
    calls: float
    exposed: float = 0.0
    """Share of the time that no computation hides."""
    turns: int = 1
    """Times that the data goes round the ring."""

    def seconds(self, device: Hardware) -> float:
        if self.name == "host":
            return self.sent / (device.host * BANDWIDTH_EFFICIENCY)
        rate, hops = device.link, self.group.size - 1
        between = self.group.nodes - 1
        if between:  # a ring enters each node once, through the adapters of all its ranks there
            rate = min(device.link, device.network * self.group.together)
        waiting = 0.0 if device.name == "cpu" else CALL_S + self.turns * (
            (hops - between) * HOP_S + between * NETWORK_HOP_S
        )  # fmt: skip
        return self.sent / (rate * BANDWIDTH_EFFICIENCY) + self.calls * waiting

    @property
    def link(self) -> str:
        return "host" if self.name == "host" else "between nodes" if self.group.nodes > 1 else "within a node"


def step_collectives(
    config: SpinConfig, shape: ModelShape, ranks: Ranks, packs: float, tokens: float, *, backward: bool
) -> list[Collective]:
    """Returns the collectives of one rank in a step of ``packs`` packs of ``tokens`` tokens.

    Weights that a tensor group holds whole have equal gradients on its ranks and need no sum.
    """
    mine = shape.split(ranks.mesh.tensor)
    found = [
        *_gathers(config, mine, ranks, packs, backward=backward),
        *_activations(config, shape, ranks, packs * tokens, backward=backward),
    ]
    if backward:
        found += _sums(config, mine, ranks, packs)
    if config.train.offload and config.train.resources.gpus:
        found += _copies(config, mine, ranks, packs, backward=backward)
    return [collective for collective in found if collective.sent]


def _gathers(
    config: SpinConfig, shape: ModelShape, ranks: Ranks, packs: float, *, backward: bool
) -> Iterator[Collective]:
    """Yields the gathers of weights.

    Each pass gathers every layer, and each training pack also the root. With ``shard_grad_op`` a training step gathers
    once, and scoring is taken to keep all weights. Computation hides all but the root and the first layer.
    """
    weights, group = weights_of(config, shape), ranks.shard
    share = (group.size - 1) / group.size
    full = config.train.sharding == "full"
    layers, layer = weights.layers * weights.layer.gathered * share, weights.layer.gathered * share
    root = weights.root.gathered * share if backward else 0.0
    times = packs if full else float(backward)
    waited = (root + layer) / (root + layers) if layers else 0.0
    calls = times * (weights.layers + bool(root))
    yield Collective(
        name="weights", phase="forward", group=group, sent=times * (root + layers), calls=calls, exposed=waited
    )
    if backward and full:
        yield Collective(
            name="weights", phase="backward", group=group, sent=times * layers, calls=times * weights.layers,
            exposed=1 / weights.layers,
        )  # fmt: skip


def _sums(config: SpinConfig, shape: ModelShape, ranks: Ranks, packs: float) -> Iterator[Collective]:
    """Yields the sums of fp32 gradients over the shard, then over replicas. The root's comes last."""
    weights, mesh = weights_of(config, shape), ranks.mesh
    whole = 4 * weights.trained
    if not whole:  # adapters of unknown layers
        return
    waited = weights.root.trained / weights.trained or 1 / weights.layers
    calls = weights.layers + bool(weights.root.trained)
    times = packs if config.train.reduces_every_pack else 1.0
    yield Collective(
        name="gradients", phase="backward", group=ranks.shard, sent=times * whole * (mesh.shard - 1) / mesh.shard,
        calls=times * calls, exposed=waited,
    )  # fmt: skip
    share = whole / mesh.shard
    yield Collective(
        name="replicas", phase="backward", group=ranks.replicate,
        sent=2 * share * (mesh.replicate - 1) / mesh.replicate, calls=calls, exposed=waited, turns=2,
    )  # fmt: skip


def _activations(
    config: SpinConfig, shape: ModelShape, ranks: Ranks, tokens: float, *, backward: bool
) -> Iterator[Collective]:
    """Yields the sums within tensor groups, which no computation hides.

    Forward sums follow attention and the feed-forward network. Backward sums add the gradients at the inputs of q, k,
    v, gate and up.
    """
    group = ranks.tensor
    sums: dict[Phase, int] = {
        "forward": 2,
        "backward": (5 + 2 * (config.train.gradient_checkpointing is True)) * backward,
    }
    one = 2 * (group.size - 1) / group.size * tokens * shape.hidden * dtype_bytes(config)
    for phase, count in sums.items():
        calls = shape.layers * count
        yield Collective(
            name="activations", phase=phase, group=group, sent=calls * one, calls=calls, exposed=1.0, turns=2
        )


def _copies(
    config: SpinConfig, shape: ModelShape, ranks: Ranks, packs: float, *, backward: bool
) -> Iterator[Collective]:
    """Yields the copies of offloaded shards to the device for each gather, and of fp32 gradients back."""
    weights, alone = weights_of(config, shape), Group(size=1, together=1)
    share = (4 * weights.trained + weights.frozen) / ranks.mesh.shard
    times = packs if config.train.sharding == "full" else 1.0
    yield Collective(name="host", phase="forward", group=alone, sent=times * share, calls=0)
    if backward:
        again = times * share if config.train.sharding == "full" else 0.0
        summed = (packs if config.train.reduces_every_pack else 1.0) * 4 * weights.trained / ranks.mesh.shard
        yield Collective(name="host", phase="backward", group=alone, sent=again + summed, calls=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    seconds: float
    bound: str
    sent: dict[str, float]
    """Bytes per rank, by ``Collective.name``."""


def step_time(collectives: list[Collective], device: Hardware, compute: dict[Phase, float]) -> StepTime:
    """Returns the time of a step whose phases compute for ``compute`` seconds.

    Links and computation work at the same time, except on CPUs.
    """
    spent: dict[str, float] = {"compute": sum(compute.values())}
    sent: dict[str, float] = {}
    total = 0.0
    for phase, computing in compute.items():
        busy: dict[str, float] = {}
        waited = 0.0
        for it in (collective for collective in collectives if collective.phase == phase):
            seconds = it.seconds(device)
            exposed = 1.0 if device.name == "cpu" else it.exposed
            busy[it.link] = busy.get(it.link, 0.0) + (1 - exposed) * seconds
            waited += exposed * seconds
            spent[BOUNDS[it.name]] = spent.get(BOUNDS[it.name], 0.0) + seconds
            sent[it.name] = sent.get(it.name, 0.0) + it.sent
        total += max([computing, *busy.values()]) + waited
    return StepTime(seconds=total, bound=max(spent, key=lambda name: spent[name]), sent=sent)
