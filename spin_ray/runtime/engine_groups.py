"""Placement groups for engines whose GPUs lie on several nodes."""

from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spin_ray.config.sections import ResourcesConfig
from spin_ray.runtime.placement import Bundles


class EngineGroups:
    """One placement group per engine, with one bundle per GPU for vLLM's Ray executor.

    The engine's actor shares the first bundle with vLLM's first worker and requests no GPU. Leaving the context removes
    the groups.
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
        """Returns Ray's options for one more actor, which starts once its group is placed."""
        # PACK uses as few nodes as possible, so that the GPUs of one layer lie on one node.
        group = ray.util.placement_group(self._bundles, "PACK", bundle_label_selector=self._labels)
        self._made.append(group)
        strategy = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        return {"scheduling_strategy": strategy}
