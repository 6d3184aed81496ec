"""The cluster of a plan."""

import re
from dataclasses import dataclass, replace
from math import ceil

from spin_ray.config.limits import parts_of_a_gpu
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, ResourceError
from spin_ray.planning.hardware import CPU, GB, GPUS, Hardware


@dataclass(frozen=True, kw_only=True)
class Cluster:
    nodes: int = 1
    gpu: str | None = None
    """Name in ``hardware.GPUS``. None or ``none``: no GPU."""
    gpus_per_node: int = 8
    network: float | None = None
    """Gb/s of all adapters of a node, one direction. None: from ``hardware.GPUS``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu", name_of_gpu(self.gpu) if self.gpu not in (None, "none") else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    generation: Hardware
    train: Hardware
    per_node: int = 8
    """Train workers of a node."""


def devices_of(config: SpinConfig, cluster: Cluster) -> Devices:
    """Returns the hardware of one engine and of one train worker.

    Raises:
        ConfigError: recipe and cluster disagree about GPUs, or the name is unknown.
        ResourceError: a stage asks for more GPUs than there are.
    """
    _check_gpus(config, cluster)
    engine, worker = config.generation.resources, config.train.resources
    gpu = GPUS[cluster.gpu] if cluster.gpu else CPU
    generation = (gpu if engine.gpus else CPU).share(engine)
    train = (gpu if worker.gpus else CPU).share(worker)
    per_node = cluster.gpus_per_node if worker.gpus else ceil(config.train.workers / cluster.nodes)
    if cluster.network is not None:
        train = replace(train, network=cluster.network / 8 * GB / per_node)
    return Devices(generation=generation, train=train, per_node=per_node)


def gpus_of_a_node(config: SpinConfig) -> int:
    """Returns the GPUs of a machine for which the recipe was made: what its largest stage asks for, 8 at most."""
    return min(8, max(1, int(max(gpus_of(config).values()))))


def name_of_gpu(given: str) -> str:
    """Returns the name in ``GPUS`` for another spelling: any case, without hyphens, or without the memory size."""
    wanted = re.sub("[- ]", "", given).casefold()
    plain = {name: name.replace("-", "").casefold() for name in GPUS}
    exact = [name for name, short in plain.items() if short == wanted]
    found = exact or [name for name, short in plain.items() if short.startswith(wanted) and wanted[-1:].isdigit()]
    return found[0] if len(found) == 1 else given


def _check_gpus(config: SpinConfig, cluster: Cluster) -> None:
    engine, worker = config.generation.resources, config.train.resources
    known = ", ".join(GPUS)
    if cluster.gpu is not None and cluster.gpu not in GPUS:
        raise ConfigError(f"--gpu {cluster.gpu}: unknown; give one of {known}, or none")
    if cluster.gpu is None and (engine.gpus or worker.gpus):
        raise ConfigError(f"--gpu: the recipe asks for GPUs; give one of {known}")
    if cluster.gpu is not None and not (engine.gpus or worker.gpus):
        raise ConfigError(
            f"--gpu {cluster.gpu}: the recipe asks for no GPU; "
            "also give --generation.resources.gpus=1 --train.resources.gpus=1"
        )
    if _groups_of_an_engine(config)[0] > cluster.gpus_per_node:
        raise ResourceError(
            f"generation.resources.gpus: one engine asks for {engine.gpus:g} GPUs, a node has {cluster.gpus_per_node}; "
            "the GPUs that share a layer are on one node, so lower generation.engine.tensor_parallel_size (and raise "
            "pipeline_parallel_size where the model needs them all)"
        )
    for stage, nodes in nodes_of(config, cluster.gpus_per_node).items():
        if nodes > cluster.nodes:
            raise ResourceError(
                f"{stage} asks for {gpus_of(config)[stage]:g} GPUs, the cluster has {cluster.nodes} × "
                f"{cluster.gpus_per_node}; give --nodes={nodes} or lower "
                f"{'generation.replicas' if stage == 'generation' else 'train.workers'}"
            )


def nodes_of(config: SpinConfig, gpus_per_node: int) -> dict[str, int]:
    """Returns the nodes that each stage needs. GPUs that share a layer are on one node."""
    size, groups = _groups_of_an_engine(config)
    wanted = {
        "generation": (size, config.generation.replicas * groups),
        "training": (config.train.resources.gpus, config.train.workers),
    }
    return {
        stage: ceil(count / max(1, places(size, gpus_per_node))) if size else 1
        for stage, (size, count) in wanted.items()
    }


def most_engines(config: SpinConfig, cluster: Cluster) -> int:
    """Returns the engines that the GPUs of the cluster hold; 0 if none fits, or engines are on CPUs."""
    size, groups = _groups_of_an_engine(config)
    return cluster.nodes * places(size, cluster.gpus_per_node) // groups if size else 0


def places(size: float, gpus: int) -> int:
    """Returns how many groups of ``size`` GPUs a node of so many holds."""
    return gpus * parts_of_a_gpu(size) if size < 1 else gpus // ceil(size)


def _groups_of_an_engine(config: SpinConfig) -> tuple[float, int]:
    """Returns the GPUs of an engine that share a layer, and the number of such groups."""
    engine, gpus = config.generation.engine, config.generation.resources.gpus
    return (gpus, 1) if gpus <= 1 else (engine.tensor_parallel_size, engine.pipeline_parallel_size)


def gpus_of(config: SpinConfig) -> dict[str, float]:
    """Returns the GPUs that each stage takes, those of which it takes a part included."""
    asked = {"generation": (config.generation.resources.gpus, config.generation.replicas)}
    asked["training"] = (config.train.resources.gpus, config.train.workers)
    return {
        stage: ceil(count / parts_of_a_gpu(size)) if 0 < size < 1 else size * count
        for stage, (size, count) in asked.items()
    }
