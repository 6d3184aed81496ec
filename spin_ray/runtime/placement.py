"""Checks that the cluster has room for every stage, and asks an autoscaler for it."""

import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from spin_ray.config.limits import parts_of_a_gpu
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ResourceError
from spin_ray.runtime.autoscaler import Ask, Request, asking, only
from spin_ray.runtime.cpu import usable_cpus
from spin_ray.runtime.gpu import runs_elsewhere

logger = logging.getLogger(__name__)

_OF_A_GROUP = re.compile(r"_group_(\d+_)?[0-9a-f]{32,}$")
"""End of the names of Ray's resources of a placement group, e.g. ``CPU_group_0_1f2e…``."""

Bundles = list[dict[str, float]]
"""Requests of actors or workers, e.g. ``[{"CPU": 2, "GPU": 1}] * 4``."""


def demands(config: SpinConfig) -> dict[str, Bundles]:
    """Returns the smallest request of each stage."""
    generation, train = config.generation, config.train
    stages = {
        "generation": engine_bundles(config) * (generation.min_replicas or generation.replicas),
        "train": [train.resources.bundle] * (train.min_workers or train.workers),
    }
    if config.scorer and config.scorer.kind != "grade":
        stages["scorer"] = [config.scorer.resources.bundle] * config.scorer.replicas
    return stages


def engine_bundles(config: SpinConfig) -> Bundles:
    """Returns one engine's bundles, one per pipeline stage. Each must fit on one node."""
    resources, engine = config.generation.resources, config.generation.engine
    if engine.pipeline_parallel_size == 1:
        return [resources.bundle]
    group = {"GPU": float(engine.tensor_parallel_size)}
    return [resources.bundle | group, *[group] * (engine.pipeline_parallel_size - 1)]


def beyond_this_process(config: SpinConfig) -> list[str]:
    """Returns a sentence for each stage that asks for more CPUs than this process may use.

    None on a cluster, or where the recipe says how many Ray should count.
    """
    usable, machine = usable_cpus(), os.cpu_count()
    if runs_elsewhere(config) or config.cluster.local_cpus:
        return []
    asked = {stage: total_of(bundles).get("CPU", 0) for stage, bundles in demands(config).items()}
    limited = f" of the machine's {machine} (taskset, Slurm or a container limits it)" if usable != machine else ""
    return [
        f"{stage} asks for {cpus:g} CPUs, and this process may use {usable}{limited}; lower {stage}.resources.cpus, or "
        f"let Ray count more (cluster.local_cpus: {math.ceil(cpus)}), which is slower"
        for stage, cpus in asked.items()
        if cpus > usable
    ]


@contextmanager
def room_for(config: SpinConfig) -> Iterator[None]:
    """Waits for room as ``check_fits``, and warns of GPUs that no stage uses.

    With ``cluster.wait_for_nodes_s`` the nodes of all stages are asked for until the end.
    """
    with asking() as ask:
        check_fits(config, ask)
        if config.cluster.wait_for_nodes_s:
            ask(request_now(config))  # also nodes that were there: they would be given back while other stages run
        elif idle := idle_gpus(config):
            logger.warning("%s", idle)
        yield


@contextmanager
def ray_train_asks(config: SpinConfig) -> Iterator[None]:
    """Leaves the train workers out of the request until the context ends, as Ray Train's own is added to it."""
    bundles, labels = demands(config)["train"], config.train.resources.labels
    with only(lambda request: beyond(request, bundles, labels)):
        yield


def beyond(request: Request, bundles: Bundles, labels: Mapping[str, str]) -> Request:
    """Returns the part of ``request`` for which ``bundles``, on nodes with ``labels``, leave no room.

    A bundle with GPUs is counted by them alone, as the CPUs come with the GPUs.
    """
    left, others = total_of(bundles), []
    for bundle, its in request:
        needed = {"GPU": bundle["GPU"]} if bundle.get("GPU") else bundle
        if labels not in ({}, its) or not covers(left, needed):
            others.append((bundle, its))
            continue
        for name, amount in needed.items():
            left[name] -= amount
    return others


def idle_gpus(config: SpinConfig) -> str | None:
    """Returns a sentence about free GPUs that no stage uses; None if there are none, or labels choose the nodes."""
    wanted = demands(config) | {
        "generation": engine_bundles(config) * config.generation.replicas,
        "train": [config.train.resources.bundle] * config.train.workers,
    }
    used = {stage: total_of(bundles).get("GPU", 0) for stage, bundles in wanted.items()}
    there = total_of(node_resources()).get("GPU", 0)
    if not any(used.values()) or there <= max(used.values()) or any(_labels(config).values()):
        return None
    free = ray.available_resources().get("GPU", 0)
    if free < max(used.values()) + 1:
        return None
    uses = ", ".join(f"{stage} uses {count:g}" for stage, count in used.items() if count)
    return (
        f"the cluster has {there:g} GPUs{f', {free:g} of them free' if free < there else ''}; {uses}; the others stay "
        "idle (generation.replicas, train.workers)"
    )


def check_fits(config: SpinConfig, ask: Ask = lambda _: None) -> None:
    """Checks every stage against the nodes; for ``cluster.wait_for_nodes_s`` calls ``ask`` for more and waits.

    Raises:
        ResourceError: a stage could never be placed.
    """
    deadline = time.monotonic() + config.cluster.wait_for_nodes_s
    stages, wanted = demands(config), _labels(config)
    while lacks := {
        stage: lack for stage, bundles in stages.items() if (lack := missing(bundles, node_resources(wanted[stage])))
    }:
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{' and '.join(_asked(stage, stages[stage], wanted[stage]) for stage in lacks)}, but the "
                f"cluster has: {'; '.join(shown(node) for node in node_resources()) or 'no nodes'}; "
                f"{'; '.join(f'{stage}: {lack}' for stage, lack in lacks.items())}; lower the request or add nodes"
            )
        ask(request_now(config))
        time.sleep(2)


def lack_of(config: SpinConfig, stage: str) -> str | None:
    """Returns what the living nodes lack to place ``stage``, were they free; None if nothing."""
    return missing(demands(config)[stage], node_resources(_labels(config)[stage]))


def request_now(config: SpinConfig) -> Request:
    """Returns the request with room for every stage, exact once the nodes of the coarse one are there."""
    stages, wanted = demands(config), _labels(config)
    request = request_for(stages, wanted, exact=False)
    return request_for(stages, wanted, exact=True) if _is_there(request) else request


def _labels(config: SpinConfig) -> dict[str, dict[str, str]]:
    sections = {"generation": config.generation, "train": config.train, "scorer": config.scorer}
    return {stage: section.resources.labels for stage, section in sections.items() if section}


def request_for(stages: Mapping[str, Bundles], wanted: Mapping[str, dict[str, str]], *, exact: bool) -> Request:
    """Returns the request in which every stage has room, one at a time.

    Args:
        wanted: labels of each stage's nodes.
        exact: False takes for granted that a node with GPUs has the CPUs of every stage, and enough of the custom
            resources that it has, so that no GPU is asked for twice.
    """

    def size(stage: str) -> tuple[bool, float, float]:
        is_special = bool(wanted[stage]) or any(bundle.keys() - {"CPU", "GPU"} for bundle in stages[stage])
        gpus, total = max((bundle.get("GPU", 0), sum(bundle.values())) for bundle in stages[stage])
        return is_special, gpus, total

    request: Request = []
    for stage in sorted(stages, key=size, reverse=True):
        rooms = [
            dict.fromkeys({"CPU", *bundle}, math.inf) | {"GPU": bundle["GPU"]}
            if "GPU" in bundle and not exact
            else bundle
            for bundle, labels in ((_with_whole_share(asked), labels) for asked, labels in request)
            if wanted[stage] in ({}, labels)
        ]
        request += [(bundle, wanted[stage]) for bundle in _unplaced(stages[stage], rooms)]
    return request


def _is_there(request: Request) -> bool:
    return all(
        placeable([bundle for bundle, its in request if its == labels], node_resources(labels))
        for labels in {str(labels): labels for _, labels in request}.values()
    )


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
    return f"there is room for {len(bundles) - len(left)}, {shown(total_of(left))} is missing"


def total_of(bundles: Bundles) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, amount in (item for bundle in bundles for item in bundle.items()):
        total[name] = total.get(name, 0) + amount
    return total


def _unplaced(bundles: Bundles, nodes: list[dict[str, float]]) -> Bundles:
    room = [dict(node) for node in nodes]
    left = []
    # Largest first, as a small bundle may take the only place of a large one.
    for bundle in sorted(bundles, key=lambda bundle: sum(bundle.values()), reverse=True):
        taken = _with_whole_share(bundle)
        node = next((node for node in room if covers(node, taken)), None)
        if node is None:
            left.append(bundle)
            continue
        for name, amount in taken.items():
            node[name] -= amount
    return left


def _with_whole_share(bundle: Mapping[str, float]) -> dict[str, float]:
    """Returns the bundle with an n-th of a GPU where one GPU holds n of such parts."""
    gpus = bundle.get("GPU", 0)
    return {**bundle, "GPU": 1 / parts_of_a_gpu(gpus)} if 0 < gpus < 1 else dict(bundle)


def covers(free: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    """Tells whether ``needed`` is free, up to half of Ray's resolution of 0.0001."""
    return all(free.get(name, 0) >= amount - 5e-5 for name, amount in needed.items())


def in_the_cluster() -> str:
    nodes = node_resources()
    free = shown(ray.available_resources())
    return f"the cluster has {shown(total_of(nodes))} in {len(nodes)} nodes, {free} of them free"


def shown(resources: Mapping[str, float]) -> str:
    """Formats resources as ``2 CPU, 1 GPU``, without Ray's own."""
    named = [
        f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "object_", "memory")) and not _OF_A_GROUP.search(name)
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


def node_resources(labels: Mapping[str, str] | None = None) -> list[dict[str, float]]:
    """Returns the resources of each living node that ``labels`` select."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in nodes if is_selected(node.get("Labels") or {}, labels or {})]
