"""A Ray cluster of three nodes on this machine, and the processes of a run on it that can be killed."""

import os
from types import TracebackType
from typing import Self

import psutil
from ray.cluster_utils import Cluster

TITLES = {
    "generation actor": "_Player",
    "train worker": "RayTrainWorker",
    "controller": "TrainController",
}
"""What Ray writes into the command line of such a process."""


class SmallCluster:
    """A head and two more nodes, of two logical CPUs each, on loopback."""

    def __enter__(self) -> Self:
        common = {"num_cpus": 2, "node_ip_address": "127.0.0.1"}
        self._cluster = Cluster(initialize_head=True, head_node_args={**common, "include_dashboard": False})
        self._others = [self._cluster.add_node(**common) for _ in range(2)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cluster.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a driver attach to it."""
        return {"RAY_ADDRESS": self._cluster.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}

    def processes(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind of ``TITLES``, or the ``engine`` processes that generation actors started."""
        found = [one for one in psutil.Process().children(recursive=True) if _is(one, TITLES.get(kind, "_Player"))]
        if kind == "engine":
            found = [child for actor in found for child in actor.children() if _is(child, "VLLM")]
        return found

    def kill_a_node(self) -> None:
        """All processes of a node that is not the head, the raylet among them."""
        self._cluster.remove_node(self._others.pop(), allow_graceful=False)

    def kill_head(self) -> None:
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)


def _is(process: psutil.Process, title: str) -> bool:
    try:
        return title in " ".join(process.cmdline())
    except psutil.Error:
        return False
