"""Raylets on this machine that act as different machines: each has its own cache, and no model folder."""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from spin_ray.runtime.connect import keep_to_loopback

WITHOUT_SERVICES = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}

_NEW_MOUNTS, _PRIVATE, _RECURSIVE = 0x00020000, 1 << 18, 1 << 14
_libc = ctypes.CDLL(None, use_errno=True)


class SmallCluster:
    """A head without CPUs, for the driver, and nodes that come and go."""

    def __init__(self, folder: Path, hidden: Path) -> None:
        """Starts the head; ``hidden`` is a folder that only the driver's machine has."""
        self._folder, self._hidden = folder, hidden
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0, "node_ip_address": "127.0.0.1", **WITHOUT_SERVICES,
                # A killed node is noticed after two seconds, one that is slow to answer is not taken for dead.
                "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
            },
        )  # fmt: skip
        # Signal handlers are for the main thread; nodes end with the head anyway.
        self._cluster._shutdown_at_exit = False
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, name: str, pool: str) -> str:
        """Adds a node of two CPUs, labelled with its pool; returns Ray's id of it. A node of pool `any` has a seat."""

        def add() -> None:
            _hide(self._hidden)  # from this thread and the processes that it starts
            self._nodes[name] = self._cluster.add_node(
                num_cpus=2, node_ip_address="127.0.0.1", labels={"pool": pool},
                resources={"seat": 1} if pool == "any" else {},
                env_vars={"SPIN_RAY_CACHE": str(self.cache(name).parent)},
            )  # fmt: skip

        thread = threading.Thread(target=add)
        thread.start()
        thread.join()
        return self.id(name)

    def kill(self, name: str) -> None:
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def id(self, name: str) -> str:
        return self._nodes[name].node_id

    def names(self) -> list[str]:
        return list(self._nodes)

    def cache(self, name: str) -> Path:
        return self._folder / f"cache-{name}" / "runs"

    def of_train_workers(self) -> list[str]:
        """Returns the node of each living train worker, by name."""
        alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
        ids = [actor["Address"]["NodeID"] for actor in alive if "TrainWorker" in actor["ActorClassName"]]
        return sorted(name for name in self._nodes for found in ids if found == self.id(name))

    def tell_trainers(self) -> None:
        """Makes elastic groups count the nodes now; their count can be 20 s old."""
        coordinator = get_or_create_autoscaling_coordinator()
        ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True), timeout=30)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def small_cluster(folder: Path, hidden: Path) -> Iterator[SmallCluster]:
    """Starts a cluster in place of this process's Ray, and stops it."""
    ray.shutdown()
    keep_to_loopback(True)  # without it Ray puts the machine's outward address in the place of the loopback one
    cluster = SmallCluster(folder, hidden)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def may_hide() -> bool:
    """Returns whether this process may make mount namespaces."""
    allowed: list[bool] = []
    thread = threading.Thread(target=lambda: allowed.append(_libc.unshare(_NEW_MOUNTS) == 0))
    thread.start()
    thread.join()
    return allowed == [True]


def when(condition: Callable[[], bool], act: Callable[[], None], *, unless: threading.Event) -> threading.Thread:

    def watch() -> None:
        while not unless.wait(0.05):
            if condition():
                act()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def _hide(folder: Path) -> None:
    for call in (
        lambda: _libc.unshare(_NEW_MOUNTS),
        lambda: _libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None),
        lambda: _libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, None),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
