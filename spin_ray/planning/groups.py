"""The mesh of the train workers, and where its groups lie.

    rank = (replica · shard + place in the shard) · tensor + place in the tensor group

So a tensor group lies on neighbouring GPUs, and a shard's ranks within a node as far as they fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Ranks by what they do: ``replicate`` copies of the states, each in ``shard`` × ``tensor`` parts."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def parts(self) -> int:
        """Parts of weights, gradients and optimizer state."""
        return self.shard * self.tensor

    @property
    def readers(self) -> int:
        """Groups of ranks that have packs of their own."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"{{replicate: {self.replicate}, shard: {self.shard}, tensor: {self.tensor}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that a collective joins, equally many on each node."""

    size: int
    together: int
    """Ranks of the group on one node."""

    @property
    def nodes(self) -> int:
        return -(-self.size // self.together)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A mesh on nodes that hold ``per_node`` ranks each."""

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
        return self._group(self.mesh.replicate, self.mesh.parts)

    def _group(self, size: int, stride: int) -> Group:
        return Group(size=size, together=min(size, max(1, self.per_node // stride)))


def flat(workers: int, per_node: int | None = None) -> Ranks:
    """Returns the mesh that shards over all workers."""
    return Ranks(mesh=Mesh(shard=workers), per_node=per_node or workers)


def choose_mesh(workers: int, per_node: int, fits: Callable[[Mesh], bool]) -> tuple[Mesh, str]:
    """Returns the mesh of ``train.mesh: auto``, and why.

    It shards over as few nodes as hold the states: the weights of every pack then cross the network as little as
    possible, and between replicas only gradients do, once a step.
    """
    if workers <= per_node:
        return Mesh(shard=workers), f"all {workers} workers are on one node" if workers > 1 else "there is one worker"
    for mesh in _hybrid(workers, per_node):
        if fits(mesh):
            where = "one node holds" if mesh.shard == per_node else f"{mesh.shard // per_node} nodes hold"
            return mesh, f"{where} the states, so that between replicas only gradients cross the network, once a step"
    if workers % per_node:
        return Mesh(shard=workers), f"{workers} workers do not fill nodes of {per_node}"
    return Mesh(shard=workers), f"the states need all {workers} workers"


def _hybrid(workers: int, per_node: int) -> Iterator[Mesh]:
    """Yields the meshes of several replicas on whole nodes, the narrowest first."""
    for shard in range(per_node, workers // 2 + 1, per_node):
        if workers % shard == 0:
            yield Mesh(replicate=workers // shard, shard=shard)
