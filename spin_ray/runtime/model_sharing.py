"""Copies a model folder from the driver's machine to the others, without a shared file system.

driver's machine: _Giver ──parts of a file, as Ray objects──> each other machine, once ──> its cache, by digest
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spin_ray.errors import TransientError, last_line
from spin_ray.run_dir import cache
from spin_ray.run_dir.object_storage import CACHE
from spin_ray.run_dir.storage import Digest, folder_digest

PART_BYTES = 2**24
KEPT_PARTS = 4
PART_TIMEOUT_S = 600.0
_givers: dict[tuple[str, str], Any] = {}
"""This driver's actors; an actor ends with its last handle."""


@dataclass(frozen=True)
class SharedFolder:
    """A model folder that every machine can get."""

    folder: Path
    """Path on the driver's machine."""
    files: Mapping[str, Digest]
    node: str
    """Ray's node id of the driver's machine."""
    giver: str
    part_bytes: int

    def local_folder(self, *, weights: bool = True) -> Path:
        """Returns the folder on this machine; fetches it once if needed.

        Raises:
            RunDirError: a fetched file differs from its digest.
            TransientError: a part did not arrive.
        """
        files = self.files if weights else cache.without_weights(self.files)
        if ray.get_runtime_context().get_node_id() == self.node or self._is_in_place(files):
            return self.folder
        giver = ray.get_actor(self.giver)
        return cache.folder_with(CACHE, files, lambda name, to: self._fetch(giver, name, to), str(self.folder))

    def _is_in_place(self, files: Mapping[str, Digest]) -> bool:
        """Tells whether the same path has the files."""
        return cache.is_whole(self.folder, files, CACHE)

    def _fetch(self, giver: Any, name: str, target: Path) -> None:
        parts = max(1, math.ceil(self.files[name].bytes / self.part_bytes))
        try:
            with target.open("wb") as file:
                asked = giver.part.remote(name, 0, self.part_bytes)
                for number in range(parts):
                    (part,) = ray.get(asked, timeout=PART_TIMEOUT_S)
                    if number + 1 < parts:
                        asked = giver.part.remote(name, number + 1, self.part_bytes)
                    file.write(ray.get(part, timeout=PART_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            where = f"{self.folder}/{name}"
            raise TransientError(f"{where}: did not arrive from the driver's machine: {last_line(error)}") from error


def share(folder: Path, files: Mapping[str, Digest]) -> SharedFolder | None:
    """Offers a local folder to the other machines; returns None if there are none."""
    if not ray_constants.ENABLE_RAY_CLUSTER and len(ray.nodes()) == 1:
        return None
    node = ray.get_runtime_context().get_node_id()
    giver = f"spin-ray-{folder_digest(files)[:16]}"
    if (node, giver) not in _givers:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"name": giver, "num_cpus": 0, "scheduling_strategy": here}
        _givers[node, giver] = ray.remote(_Giver).options(**options).remote(folder, files)
    return SharedFolder(folder, files, node, giver, PART_BYTES)


class _Giver:
    def __init__(self, folder: Path, files: Mapping[str, Digest]) -> None:
        self._folder, self._files = folder, files
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def part(self, name: str, number: int, size: int) -> list[Any]:
        """Returns a reference in a list, because Ray would replace a bare one by its value."""
        if name not in self._files:
            raise ValueError(f"{name} is no file of {self._folder}")
        found = self._kept.get((name, number))
        if found is None:
            with (self._folder / name).open("rb") as file:
                file.seek(number * size)
                found = self._kept[name, number] = ray.put(file.read(size))
            while len(self._kept) > KEPT_PARTS:
                self._kept.popitem(last=False)
        return [found]
