"""Times of a recipe on fewer nodes and with larger batches."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh
from spin_ray.errors import UserError
from spin_ray.planning.cluster import Cluster, devices_of, most_engines
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.rows import settle
from spin_ray.planning.run_cost import plan_run, planned_mesh
from spin_ray.planning.work import Planned, Work

BATCHES = tuple(2**power for power in range(7))
"""Tried factors of the recipe's batch."""
NEAR = 1.05
"""Factor within which a time counts as the shortest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A run on all GPUs of some nodes."""

    nodes: int
    workers: int
    replicas: int
    batch: int
    """Pairs of an optimizer step."""
    mesh: str
    hours: float

    @property
    def options(self) -> str:
        return f"--nodes={self.nodes} --train.workers={self.workers} --generation.replicas={self.replicas}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Times on 1, 2, 4, … and all nodes, where the run fits."""

    with_own_batch: tuple[Size, ...]
    with_enough: tuple[Size, ...]
    """Times with the smallest batch that is near the shortest time on all nodes; on few nodes it may not fit."""

    @property
    def advised(self) -> Size:
        """Fewest nodes near the shortest time with the recipe's batch."""
        shortest = min(size.hours for size in self.with_own_batch)
        return next(size for size in self.with_own_batch if size.hours <= NEAR * shortest)

    @property
    def batch(self) -> int:
        return self.with_enough[-1].batch

    @property
    def scales(self) -> bool:
        """True if the recipe's batch keeps all nodes busy."""
        return self.batch == self.with_own_batch[-1].batch

    def sentences(self) -> Iterator[str]:
        """Yields advice on nodes and batch."""
        most, advised, enough = self.with_own_batch[-1], self.advised, self.with_enough[-1]
        if advised.nodes < most.nodes:
            yield (
                f"Nodes: a batch of {most.batch} pairs is too small for {most.nodes}, which take {most.hours:.2f} h; "
                f"with {advised.options} it is {advised.hours:.2f} h."
            )
        else:
            yield f"Nodes: {most.nodes} of them take {most.hours:.2f} h, with {most.options}."
        if not self.scales:
            yield (
                f"Batch: with --train.global_batch_pairs={enough.batch} in place of {most.batch}, {enough.nodes} nodes "
                f"would take {enough.hours:.2f} h. That is another experiment: fewer and larger steps."
            )

    def as_json(self) -> dict[str, Any]:
        return {
            "with_own_batch": [asdict(size) for size in self.with_own_batch],
            "with_enough": [asdict(size) for size in self.with_enough],
            "advised": asdict(self.advised),
            "scales": self.scales,
        }


def scaling_of(
    config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work, algorithm: Planned
) -> Scaling | None:
    """Returns times on fewer nodes and with larger batches; None for one node, CPUs or a mesh of fixed sizes.

    Args:
        config: the recipe before ``settle_sizes``, so that shards fit each number of engines.
    """
    if cluster.nodes == 1 or not config.train.resources.gpus or isinstance(config.train.mesh, Mesh):
        return None
    counts = sorted({2**power for power in range(cluster.nodes.bit_length())} | {cluster.nodes})

    def sizes(batch: int) -> tuple[Size, ...]:
        found = (_size(config, shape, replace(cluster, nodes=nodes), work, batch, algorithm) for nodes in counts)
        return tuple(size for size in found if size)

    own = config.train.global_batch_pairs
    tried = [sizes(own * factor) for factor in BATCHES if own * factor <= max(own, work.rows)]
    rows = [row for row in tried if row and row[-1].nodes == cluster.nodes]
    if not rows or rows[0] is not tried[0]:
        return None
    shortest = min(row[-1].hours for row in rows)
    enough = next(row for row in rows if row[-1].hours <= NEAR * shortest)
    return Scaling(with_own_batch=rows[0], with_enough=enough)


def on_all_gpus(config: SpinConfig, cluster: Cluster, batch: int) -> SpinConfig:
    """Returns the recipe with a train worker on each GPU and as many engines as fit, at least one."""
    generation = config.generation
    if generation.resources.gpus:
        generation = generation.model_copy(update={"replicas": max(1, most_engines(config, cluster))})
    config = config.with_train(workers=cluster.nodes * cluster.gpus_per_node, global_batch_pairs=batch)
    return config.model_copy(update={"generation": generation})


def _size(
    config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work, batch: int, algorithm: Planned
) -> Size | None:
    changed = settle(on_all_gpus(config, cluster, batch), work.rows)
    try:
        devices = devices_of(changed, cluster)
    except UserError:
        return None
    phases = plan_run(changed, shape, devices, work, algorithm)
    if not all(stage.fits for phase in phases for stage in phase.stages):
        return None
    return Size(
        nodes=cluster.nodes, workers=changed.train.workers, replicas=changed.generation.replicas, batch=batch,
        mesh=str(planned_mesh(changed, shape, devices).mesh), hours=sum(phase.seconds for phase in phases) / 3600,
    )  # fmt: skip
