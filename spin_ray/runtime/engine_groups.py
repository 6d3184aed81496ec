"""Placement groups of engines whose GPUs lie on several nodes."""

from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spin_ray.config.sections import ResourcesConfig
from spin_ray.runtime.placement import Bundles


class EngineGroups:
    """A placement group for each engine, with one bundle per GPU, as vLLM's Ray executor wants it.

    The engine's actor lies in the first bundle beside vLLM's first worker, and asks for no GPU itself. Leaving the
    context removes the groups.
    """

    def __init__(self, resources: ResourcesConfig, gpus: int) -> None:
        self.actor = resources.model_copy(update={"gpus": 0, "labels": {}})
        self._bundles: Bundles = [self.actor.bundle | {"GPU": 1.0}, *[{"GPU": 1.0}] * (gpus - 1)]
        self._labels = [resources.labels] * gpus if resources.labels else None
        self._made: list[PlacementGroup] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._made:
            ray.util.remove_placement_group(group)

    def place(self) -> dict[str, Any]:
        """Returns the options of one more actor, which starts when its group is placed."""
        # PACK takes as few nodes as possible, so that the GPUs of one layer lie on one node.
        group = ray.util.placement_group(self._bundles, "PACK", bundle_label_selector=self._labels)
        self._made.append(group)
        strategy = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        return {"scheduling_strategy": strategy}
