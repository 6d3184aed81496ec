"""The cluster of a plan."""

from dataclasses import dataclass, replace
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, ResourceError
from spin_ray.planning.hardware import CPU, GPUS, NETWORK, Hardware


@dataclass(frozen=True, kw_only=True)
class Cluster:
    nodes: int = 1
    gpu: str | None = None
    """Name in ``hardware.GPUS``; None: no GPU."""
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    generation: Hardware
    train: Hardware


def devices_of(config: SpinConfig, cluster: Cluster) -> Devices:
    """Returns the hardware of one engine and of one train worker.

    Raises:
        ConfigError: recipe and cluster disagree about GPUs, or their name is unknown.
        ResourceError: a stage asks for more GPUs than there are.
    """
    _check_gpus(config, cluster)
    engine, worker = config.generation.resources, config.train.resources
    gpu = GPUS[cluster.gpu] if cluster.gpu else CPU
    generation = (gpu if engine.gpus else CPU).share(engine)
    train = (gpu if worker.gpus else CPU).share(worker)
    spread = config.train.workers > cluster.gpus_per_node if worker.gpus else cluster.nodes > 1
    return Devices(generation=generation, train=replace(train, link=min(train.link, NETWORK)) if spread else train)


def _check_gpus(config: SpinConfig, cluster: Cluster) -> None:
    engine, worker = config.generation.resources, config.train.resources
    known = ", ".join(GPUS)
    if cluster.gpu is not None and cluster.gpu not in GPUS:
        raise ConfigError(f"--gpu {cluster.gpu}: unknown; give one of {known}")
    if cluster.gpu is None and (engine.gpus or worker.gpus):
        raise ConfigError(f"--gpu: the recipe asks for GPUs; give one of {known}")
    if cluster.gpu is not None and not (engine.gpus or worker.gpus):
        raise ConfigError(
            f"--gpu {cluster.gpu}: the recipe asks for no GPU; "
            "also give --generation.resources.gpus=1 --train.resources.gpus=1"
        )
    if engine.gpus > cluster.gpus_per_node:
        raise ResourceError(
            f"generation.resources.gpus: one engine asks for {engine.gpus:g} GPUs, a node has {cluster.gpus_per_node}; "
            "an engine runs on one node, so lower generation.engine.tensor_parallel_size, too"
        )
    for stage, count in gpus_of(config).items():
        if count > cluster.nodes * cluster.gpus_per_node:
            raise ResourceError(
                f"{stage} asks for {count:g} GPUs, the cluster has {cluster.nodes} × {cluster.gpus_per_node}; "
                f"give --nodes={ceil(count / cluster.gpus_per_node)} or lower "
                f"{'generation.replicas' if stage == 'generation' else 'train.workers'}"
            )


def gpus_of(config: SpinConfig) -> dict[str, float]:
    return {
        "generation": config.generation.replicas * config.generation.resources.gpus,
        "training": config.train.workers * config.train.resources.gpus,
    }
