"""A Ray cluster of three nodes on this machine, whose nodes and processes can be killed."""

import os
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import psutil
from ray.cluster_utils import Cluster

from tests.support.small_cluster import WITHOUT_SERVICES

TITLES = {"generation actor": "_Player", "train worker": "RayTrainWorker", "controller": "TrainController"}
"""Texts in the command lines of Ray's processes."""


class KillableCluster:
    """A head and two more nodes, of two logical CPUs each."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self._usual_folder = os.environ.get("RAY_TMPDIR")

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Starts the cluster, also again after its head was killed."""
        node = {"num_cpus": 2}
        # Ray notes there the address of a machine's newest cluster; short, as sockets are there too.
        os.environ["RAY_TMPDIR"] = self._folder.name
        self._cluster = Cluster(initialize_head=True, head_node_args=node | WITHOUT_SERVICES)
        self._others = [self._cluster.add_node(**node) for _ in range(2)]
        self.is_alive = True
        self.environment = {"RAY_ADDRESS": self._cluster.address, "RAY_AUTH_MODE": "disabled"}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_alive:
            self._cluster.shutdown()
        self._folder.cleanup()
        del os.environ["RAY_TMPDIR"]
        if self._usual_folder:
            os.environ["RAY_TMPDIR"] = self._usual_folder

    @staticmethod
    def processes(kind: str) -> list[psutil.Process]:
        """Returns living processes of a kind of ``TITLES``, or ``engine`` processes of generation actors."""
        title = TITLES.get(kind, "_Player")
        found = {one.pid: one for one in psutil.Process().children(recursive=True) if title in _command(one)}
        # An engine's process is forked off its actor, and has its title at first.
        found = {pid: one for pid, one in found.items() if _parent(one) not in found}
        if kind == "engine":
            return [child for actor in found.values() for child in _children(actor)]
        return list(found.values())

    def kill_a_node(self) -> None:
        """Kills all processes of a node that is not the head."""
        self._cluster.remove_node(self._others.pop(), allow_graceful=False)

    def kill_the_head(self) -> None:
        """Kills the head and the other nodes, which are of no use without it."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        while self._others:
            self.kill_a_node()
        self.is_alive = False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []
