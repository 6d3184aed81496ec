"""What the run asks of Ray: connecting, checking that every stage fits, waiting with a limit."""

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ray
from ray._private import ray_constants

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ResourceError, StageError, first_line

Row = TypeVar("Row")
Bundles = list[dict[str, float]]


def connect(config: SpinConfig) -> None:
    """Attaches to the cluster of the config or of $RAY_ADDRESS, or starts an embedded Ray; nothing if it is up.

    Raises:
        ResourceError: no cluster answers at the address within 41 s.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if not ray.is_initialized():
        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "num_cpus": config.cluster.local_cpus, "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }  # fmt: skip
        _keep_to_loopback(not address)
        if not address:
            # Ray Train's placement group cleaner looks for the dashboard: without one it keeps every stage waiting for
            # 12 s at its end, unless the address is known and refuses. Raylet and workers inherit it.
            os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
            # Nobody announces the end of this machine; the watcher would be one more process for each worker group.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        else:
            # How often Ray tries, 41 s each time; 20 times if nothing is said.
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(f"cluster.address {address}: cannot be reached ({first_line(error)})") from error
        if threading.current_thread() is threading.main_thread():
            take_signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def take_signal(number: int, handle: Callable[[int, Any], None]) -> None:
    """Calls ``handle`` on a signal, and lets it take its time.

    Ray's core (abseil's failure handler) sets an alarm on SIGTERM that aborts the process 3 s later, in the middle of
    giving back what it holds.
    """

    def handle_in_peace(number: int, frame: Any) -> None:
        signal.alarm(0)
        handle(number, frame)

    signal.signal(number, handle_in_peace)


def _keep_to_loopback(embedded: bool) -> None:
    """Ray's servers listen on all interfaces, unless the node's address is the loopback one; and that Ray replaces by
    an outward one, unless it takes this for a system that cannot be part of a cluster. True of an embedded Ray.
    """
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if embedded:
        os.environ[variable] = "0"  # for the processes that Ray starts
    else:
        os.environ.pop(variable, None)
    ray_constants.ENABLE_RAY_CLUSTER = not embedded  # for this process, which has read the variable already


def demands(config: SpinConfig) -> dict[str, Bundles]:
    """What each stage needs at the same time, at least; one bundle per actor or worker."""
    generation, train = config.generation, config.train
    stages = {
        "generation": [generation.resources.bundle] * (generation.min_replicas or generation.replicas),
        "train": [train.resources.bundle] * (train.min_workers or train.workers),
    }
    if config.scorer:
        stages["scorer"] = [config.scorer.resources.bundle] * config.scorer.replicas
    return stages


def check_fits(config: SpinConfig) -> None:
    """Checks every stage against the nodes of the cluster, waiting for nodes to join if the config allows it.

    Raises:
        ResourceError: a stage could never be placed; the message says what it asks for and what the cluster has.
    """
    deadline = time.monotonic() + config.cluster.wait_for_nodes_s
    labels = {"generation": config.generation, "train": config.train, "scorer": config.scorer}
    wanted = {stage: section.resources.labels for stage, section in labels.items() if section}
    while problems := [
        f"{stage} asks for {len(bundles)} × {_shown(bundles[0])} "
        f"({stage}.{'workers' if stage == 'train' else 'replicas'}, {stage}.resources)"
        + (f" on nodes labelled {wanted[stage]}" if wanted[stage] else "")
        for stage, bundles in demands(config).items()
        if not _placeable(bundles, _node_resources(wanted[stage]))
    ]:
        if time.monotonic() >= deadline:
            nodes = "; ".join(_shown(node) for node in _node_resources()) or "no nodes"
            raise ResourceError(
                f"{' and '.join(problems)}, but the cluster has: {nodes}; lower the request or add nodes"
            )
        _ask_autoscaler(config)
        time.sleep(2)


def wait_until_free(bundles: Bundles, timeout_s: float, stage: str) -> None:
    """Waits until what the last stage held is free again for ``stage``.

    Raises:
        StageError: still taken after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        free = ray.available_resources()
        needed: dict[str, float] = {}
        for bundle in bundles:
            for name, amount in bundle.items():
                needed[name] = needed.get(name, 0) + amount
        if _has(free, needed):
            return
        if time.monotonic() > deadline:
            raise StageError(f"{stage}: waited {timeout_s:.0f} s for {_shown(needed)} to be free; {in_the_cluster()}")
        time.sleep(0.1)


def with_deadline(rows: Iterable[Row], first_s: float, next_s: float, what: str) -> Iterator[Row]:
    """Passes ``rows`` on, and gives up when nothing comes.

    Raises:
        StageError: no first row within ``first_s`` seconds, or no further one within ``next_s``.
    """
    done = object()
    arrived: queue.Queue[Any] = queue.Queue()

    def pump() -> None:
        try:
            for row in rows:
                arrived.put(row)
            arrived.put(done)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=pump, name=what, daemon=True).start()
    timeout_s = first_s
    while True:
        try:
            item = arrived.get(timeout=timeout_s)
        except queue.Empty:
            raise StageError(f"waited {timeout_s:.0f} s for {what}; {in_the_cluster()}") from None
        if item is done:
            return
        if isinstance(item, BaseException):
            raise item
        timeout_s = next_s
        yield item


def while_it_moves(call: Callable[[], Row], progress: Callable[[], Any], limit_s: float, what: str) -> Row:
    """What ``call`` returns, as long as ``progress()`` changes now and then.

    Raises:
        StageError: it was the same for ``limit_s`` seconds. The call goes on in its thread: the driver ends now.
    """
    ended: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=run, name=what, daemon=True).start()
    seen, since = progress(), time.monotonic()
    while True:
        try:
            result, error = ended.get(timeout=min(limit_s / 4, 30))
        except queue.Empty:
            if (now := progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > limit_s:
                raise StageError(
                    f"waited {limit_s:.0f} s for {what}; {in_the_cluster()}; run the command again to go on"
                ) from None
            continue
        if error is not None:
            raise error
        return result


def in_the_cluster() -> str:
    """For messages: ``the cluster has 8 CPU in 2 nodes, 2 CPU of them free``."""
    nodes = _node_resources()
    total = {name: sum(node.get(name, 0) for node in nodes) for node in nodes for name in node}
    free = _shown(ray.available_resources())
    return f"the cluster has {_shown(total)} in {len(nodes)} nodes, {free} of them free"


def _node_resources(labels: Mapping[str, str] | None = None) -> list[dict[str, float]]:
    """Of the nodes that a label selector admits."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in nodes if is_selected(node.get("Labels") or {}, labels or {})]


def is_selected(found: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels fit Ray's selector: ``v``, ``!v``, ``in(v, w)`` or ``!in(v, w)`` for each label."""
    for label, condition in selector.items():
        bare = condition.removeprefix("!")
        values = [value.strip() for value in bare.removeprefix("in(").removesuffix(")").split(",")]
        if (found.get(label) in values) == condition.startswith("!"):
            return False
    return True


def _placeable(bundles: Bundles, nodes: list[dict[str, float]]) -> bool:
    """Whether the bundles find room on the nodes, largest first, each on the first node that has room."""
    room = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: sum(bundle.values()), reverse=True):
        node = next((node for node in room if _has(node, bundle)), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


def _has(free: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    """Whether ``needed`` is free, up to half of Ray's own resolution of 0.0001: five times 0.6 CPU are three."""
    return all(free.get(name, 0) >= amount - 5e-5 for name, amount in needed.items())


def _ask_autoscaler(config: SpinConfig) -> None:
    from ray.autoscaler.sdk import request_resources

    largest = max(demands(config).values(), key=lambda bundles: sum(sum(bundle.values()) for bundle in bundles))
    request_resources(bundles=largest)


def _shown(resources: Mapping[str, float]) -> str:
    """Resources a person asks for, e.g. ``2 CPU, 1 GPU``; not Ray's own (memory, node names)."""
    shown = [
        f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "object_", "memory"))
    ]
    return ", ".join(shown) or "nothing"
