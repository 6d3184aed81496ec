"""Checks that the cluster has room for every stage."""

import time
from collections.abc import Mapping

import ray

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ResourceError

Bundles = list[dict[str, float]]
"""Requests of actors or workers, e.g. ``[{"CPU": 2, "GPU": 1}] * 4``."""


def demands(config: SpinConfig) -> dict[str, Bundles]:
    """Returns the smallest request of each stage."""
    generation, train = config.generation, config.train
    stages = {
        "generation": engine_bundles(config) * (generation.min_replicas or generation.replicas),
        "train": [train.resources.bundle] * (train.min_workers or train.workers),
    }
    if config.scorer:
        stages["scorer"] = [config.scorer.resources.bundle] * config.scorer.replicas
    return stages


def engine_bundles(config: SpinConfig) -> Bundles:
    """Returns one engine's bundles, one per pipeline stage. Each must fit on one node."""
    resources, engine = config.generation.resources, config.generation.engine
    if engine.pipeline_parallel_size == 1:
        return [resources.bundle]
    group = {"GPU": float(engine.tensor_parallel_size)}
    return [resources.bundle | group, *[group] * (engine.pipeline_parallel_size - 1)]


def check_fits(config: SpinConfig) -> None:
    """Checks every stage against the nodes; waits ``cluster.wait_for_nodes_s`` for more.

    Raises:
        ResourceError: a stage could never be placed.
    """
    deadline = time.monotonic() + config.cluster.wait_for_nodes_s
    labels = {"generation": config.generation, "train": config.train, "scorer": config.scorer}
    wanted = {stage: section.resources.labels for stage, section in labels.items() if section}
    while lacks := {
        stage: lack
        for stage, bundles in demands(config).items()
        if (lack := missing(bundles, _node_resources(wanted[stage])))
    }:
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{' and '.join(_asked(stage, demands(config)[stage], wanted[stage]) for stage in lacks)}, but the "
                f"cluster has: {'; '.join(shown(node) for node in _node_resources()) or 'no nodes'}; "
                f"{'; '.join(f'{stage}: {lack}' for stage, lack in lacks.items())}; lower the request or add nodes"
            )
        _ask_autoscaler(config)
        time.sleep(2)


def _asked(stage: str, bundles: Bundles, labels: Mapping[str, str]) -> str:
    settings = f"{stage}.{'workers' if stage == 'train' else 'replicas'}, {stage}.resources"
    on = f" on nodes labelled {labels}" if labels else ""
    return f"{stage} asks for {len(bundles)} × {shown(bundles[0])} ({settings}){on}"


def placeable(bundles: Bundles, nodes: list[dict[str, float]]) -> bool:
    return not _unplaced(bundles, nodes)


def missing(bundles: Bundles, nodes: list[dict[str, float]]) -> str | None:
    """Returns what the nodes lack to place all bundles, each on one node; None if nothing."""
    left = _unplaced(bundles, nodes)
    if not left:
        return None
    for name, amount in left[0].items():
        most = max((node.get(name, 0) for node in nodes), default=0)
        if not covers({name: most}, {name: amount}):
            return f"no node has {amount:g} {name}, the most is {most:g}"
    if not any(covers(node, left[0]) for node in nodes):
        return f"no node has {shown(left[0])} together"
    lack: dict[str, float] = {}
    for name, amount in (item for bundle in left for item in bundle.items()):
        lack[name] = lack.get(name, 0) + amount
    return f"there is room for {len(bundles) - len(left)}, {shown(lack)} is missing"


def _unplaced(bundles: Bundles, nodes: list[dict[str, float]]) -> Bundles:
    room = [dict(node) for node in nodes]
    left = []
    # Largest first, as a small bundle may take the only place of a large one.
    for bundle in sorted(bundles, key=lambda bundle: sum(bundle.values()), reverse=True):
        node = next((node for node in room if covers(node, bundle)), None)
        if node is None:
            left.append(bundle)
            continue
        for name, amount in bundle.items():
            node[name] -= amount
    return left


def covers(free: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    """Tells whether ``needed`` is free, up to half of Ray's resolution of 0.0001."""
    return all(free.get(name, 0) >= amount - 5e-5 for name, amount in needed.items())


def in_the_cluster() -> str:
    nodes = _node_resources()
    total = {name: sum(node.get(name, 0) for node in nodes) for node in nodes for name in node}
    free = shown(ray.available_resources())
    return f"the cluster has {shown(total)} in {len(nodes)} nodes, {free} of them free"


def shown(resources: Mapping[str, float]) -> str:
    """Formats resources as ``2 CPU, 1 GPU``, without Ray's own."""
    named = [
        f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "object_", "memory"))
    ]
    return ", ".join(named) or "nothing"


def is_selected(found: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Tells whether labels match Ray's selector: ``v``, ``!v``, ``in(v, w)`` or ``!in(v, w)``."""
    for label, condition in selector.items():
        bare = condition.removeprefix("!")
        values = [value.strip() for value in bare.removeprefix("in(").removesuffix(")").split(",")]
        if (found.get(label) in values) == condition.startswith("!"):
            return False
    return True


def _node_resources(labels: Mapping[str, str] | None = None) -> list[dict[str, float]]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in nodes if is_selected(node.get("Labels") or {}, labels or {})]


def _ask_autoscaler(config: SpinConfig) -> None:
    from ray.autoscaler.sdk import request_resources

    largest = max(demands(config).values(), key=lambda bundles: sum(sum(bundle.values()) for bundle in bundles))
    request_resources(bundles=largest)
