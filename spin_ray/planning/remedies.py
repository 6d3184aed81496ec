"""Settings that would make a stage fit in memory: each is tried with the cost model before it is named."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, ResourceError, UserError
from spin_ray.planning.cost_model import Devices, Work, plan_run
from spin_ray.planning.hardware import CPU, GIB, GPUS, NETWORK
from spin_ray.planning.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Cluster:
    nodes: int = 1
    gpu: str | None = None
    """A name of ``hardware.GPUS``; None where the recipe asks for no GPU."""
    gpus_per_node: int = 8


def devices_of(config: SpinConfig, cluster: Cluster) -> Devices:
    """What an engine and a train worker run on.

    Raises:
        ConfigError: the recipe asks for GPUs and none is named, or the other way round.
        ResourceError: a stage asks for more GPUs than there are.
    """
    engine, worker = config.generation.resources, config.train.resources
    if cluster.gpu is not None and cluster.gpu not in GPUS:
        raise ConfigError(f"--gpu {cluster.gpu}: unknown; one of {', '.join(GPUS)}")
    if cluster.gpu is None and (engine.gpus or worker.gpus):
        raise ConfigError(f"--gpu: the recipe asks for GPUs; name theirs, one of {', '.join(GPUS)}")
    if cluster.gpu is not None and not (engine.gpus or worker.gpus):
        raise ConfigError(
            f"--gpu {cluster.gpu}: the recipe asks for no GPU; "
            "give --generation.resources.gpus=1 --train.resources.gpus=1, too"
        )
    if engine.gpus > cluster.gpus_per_node:
        raise ResourceError(
            f"generation.resources.gpus: {engine.gpus:g} for one engine, a node has {cluster.gpus_per_node}; "
            "an engine is on one node"
        )
    for stage, count in gpus_of(config).items():
        if count > cluster.nodes * cluster.gpus_per_node:
            raise ResourceError(
                f"{stage} asks for {count:g} GPUs, {cluster.nodes} × {cluster.gpus_per_node} are there; "
                f"give --nodes={ceil(count / cluster.gpus_per_node)} or lower "
                f"{'generation.replicas' if stage == 'generation' else 'train.workers'}"
            )
    gpu = GPUS[cluster.gpu] if cluster.gpu else CPU
    generation = (gpu if engine.gpus else CPU).share(engine)
    train = (gpu if worker.gpus else CPU).share(worker)
    spread = config.train.workers > cluster.gpus_per_node if worker.gpus else cluster.nodes > 1
    return Devices(generation=generation, train=replace(train, link=min(train.link, NETWORK)) if spread else train)


def gpus_of(config: SpinConfig) -> dict[str, float]:
    """GPUs that each stage asks for."""
    return {
        "generation": config.generation.replicas * config.generation.resources.gpus,
        "training": config.train.workers * config.train.resources.gpus,
    }


def remedies(config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work, stage: str) -> list[str]:
    """Settings under which the stage was found to fit: every change that is enough alone, else a sum of changes."""

    def words(changes: dict[str, Any]) -> str | None:
        return _if_it_fits(config, shape, cluster, work, stage, changes)

    candidates = list(_changes(config, shape, stage))
    alone: dict[frozenset[str], str] = {}
    for changes in candidates:
        if frozenset(changes) not in alone and (shown := words(changes)):
            alone[frozenset(changes)] = shown
    if alone:
        return list(alone.values())
    together: dict[str, Any] = {}
    for changes in candidates:
        together |= changes
        if words(together):
            for key in list(together):  # what is not needed after all
                fewer = {name: value for name, value in together.items() if name != key}
                together = fewer if words(fewer) else together
            return [words(together) or ""]
    return []


def _if_it_fits(
    config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work, stage: str, changes: dict[str, Any]
) -> str | None:
    """The changes as words of the command line, if the stage fits with them; nodes are added as they need."""
    try:
        tried = _changed(config, changes)
        nodes = max(cluster.nodes, ceil(max(gpus_of(tried).values()) / cluster.gpus_per_node))
        devices = devices_of(tried, replace(cluster, nodes=nodes))
    except UserError:  # a combination that no run can have
        return None
    costs = [cost for phase in plan_run(tried, shape, devices, work) for cost in phase.stages]
    if not all(cost.fits for cost in costs if cost.name == stage):
        return None
    words = [f"--{key}={str(value).lower()}" for key, value in changes.items()]
    return " ".join([*words, f"--nodes={nodes}"] if nodes > cluster.nodes else words)


def _changes(config: SpinConfig, shape: ModelShape, stage: str) -> Iterator[dict[str, Any]]:
    """What might help, the least harm first: nothing that changes the objective, the data or the batch."""
    engine, train = config.resolve_dtype(config.generation.engine), config.train
    if stage == "generation":
        if not config.generation.resources.gpus:
            longest = config.model.max_length * shape.kv_bytes(4 if engine.dtype == "float32" else 2)
            yield {"generation.engine.cpu_kv_cache_gib": ceil(longest / GIB)}
            return
        for parallel in (2, 4, 8):
            yield {
                "generation.engine.tensor_parallel_size": parallel,
                "generation.resources.gpus": parallel,
                "generation.replicas": max(1, config.generation.replicas // parallel),
            }
        return
    if stage == "training":
        yield {"train.gradient_checkpointing": True}
    yield {"train.sharding": "full"}
    if stage == "training":
        yield {"train.reduce_every_pack": True}
    for times in (2, 4):  # a rank with a single pack keeps no whole gradients
        yield {"train.pack_length": times * train.pack_length}
    yield {"train.pack_length": config.model.max_length + config.generation.sampling.max_tokens}
    for times in (2, 4, 8, 16):
        yield {"train.workers": times * train.workers}


def _changed(config: SpinConfig, changes: dict[str, Any]) -> SpinConfig:
    """Raises ConfigError if the values do not go together."""
    tree = config.model_dump()
    for key, value in changes.items():
        *sections, field = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[field] = value
    return parse_config(tree, source="plan")
