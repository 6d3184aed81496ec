"""The groups of ranks in a mesh.

    rank = (replica · shard + place in the shard) · tensor + place in the tensor group

A tensor group is on neighbouring GPUs, and a shard within a node as far as it fits.
"""

from dataclasses import dataclass

from spin_ray.config.sections import Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of a collective, equally many on each node."""

    size: int
    together: int
    """Ranks on one node."""

    @property
    def nodes(self) -> int:
        return -(-self.size // self.together)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    mesh: Mesh
    per_node: int

    @property
    def tensor(self) -> Group:
        return self._group(self.mesh.tensor, 1)

    @property
    def shard(self) -> Group:
        return self._group(self.mesh.shard, self.mesh.tensor)

    @property
    def replicate(self) -> Group:
        return self._group(self.mesh.replicate, self.mesh.shard * self.mesh.tensor)

    def _group(self, size: int, stride: int) -> Group:
        return Group(size=size, together=min(size, max(1, self.per_node // stride)))
