"""Settings that make generation, or all stages of the train workers, fit in memory, each tried before it is named."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Any

from spin_ray.config.load import parse_config, put
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import UserError
from spin_ray.planning.cluster import Cluster, devices_of, gpus_of, nodes_of
from spin_ray.planning.generation_cost import GENERATION, engine_bytes
from spin_ray.planning.hardware import GIB
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.run_cost import plan_run
from spin_ray.planning.work import Planned, Work


def remedies(
    config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work, stage: str, algorithm: Planned
) -> list[str]:
    """Returns each change that suffices alone; else one combination, or nothing.

    Args:
        stage: the stage that does not fit. For generation it must then fit, else every other stage.
    """

    def words(changes: dict[str, Any]) -> str | None:
        return _if_it_fits(config, shape, cluster, work, stage, changes, algorithm)

    candidates = list(_changes(config, shape, stage, algorithm.least_pack(config)))
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
            for key in list(together):  # a change may turn out to be unnecessary
                fewer = {name: value for name, value in together.items() if name != key}
                together = fewer if words(fewer) else together
            return [words(together) or ""]
    return []


def _if_it_fits(
    config: SpinConfig,
    shape: ModelShape,
    cluster: Cluster,
    work: Work,
    stage: str,
    changes: dict[str, Any],
    algorithm: Planned,
) -> str | None:
    try:
        tried = _changed(config, changes)
        nodes = max(cluster.nodes, *nodes_of(tried, cluster.gpus_per_node).values())
        devices = devices_of(tried, replace(cluster, nodes=nodes))
    except UserError:  # a combination that no run can have
        return None
    costs = [cost for phase in plan_run(tried, shape, devices, work, algorithm) for cost in phase.stages]
    generates = stage == GENERATION
    if not all(cost.fits for cost in costs if (cost.name == GENERATION) == generates):
        return None
    words = [f"--{key}={str(value).lower()}" for key, value in changes.items()]
    return " ".join([*words, f"--nodes={nodes}"] if nodes > cluster.nodes else words)


def _changes(config: SpinConfig, shape: ModelShape, stage: str, least_pack: int) -> Iterator[dict[str, Any]]:
    """Yields changes, the least harmful first. Objective, data and batch stay."""
    if stage != GENERATION:
        yield from _changes_of_training(config, least_pack)
    elif not config.generation.resources.gpus:
        longest = config.model.max_length * shape.kv_bytes(engine_bytes(config))
        yield {"generation.engine.cpu_kv_cache_gib": ceil(longest / GIB)}
    else:
        gpus = gpus_of(config)[GENERATION]
        for parallel in (size for size in (2, 4, 8) if not shape.engine_sizes.why_not(size)):
            yield {
                "generation.engine.tensor_parallel_size": parallel,
                "generation.resources.gpus": parallel,
                "generation.replicas": max(1, int(gpus // parallel)),
            }


def _changes_of_training(config: SpinConfig, least_pack: int) -> Iterator[dict[str, Any]]:
    train, lora = config.train, config.train.lora
    yield {"train.gradient_checkpointing": True}
    yield {"train.sharding": "full"}
    yield {"train.reduce_every_pack": True}
    for times in (2, 4):  # a rank with a single pack keeps no whole gradients
        yield {"train.pack_length": times * train.pack_length}
    yield {"train.pack_length": least_pack}
    if lora and lora.is_quantised:  # a quantised base is loaded whole
        yield {"train.lora.base": "bf16"}
    for times in (2, 4, 8, 16):
        yield {"train.workers": times * train.workers}
    if lora and not lora.is_quantised:
        yield {"train.lora.base": "nf4", "train.lora.merge": False}
    if train.resources.gpus:
        yield {"train.offload": True}


def _changed(config: SpinConfig, changes: dict[str, Any]) -> SpinConfig:
    tree = config.model_dump()
    for key, value in changes.items():
        put(tree, key, value)
    return parse_config(tree, source="plan")
