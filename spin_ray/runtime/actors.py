"""Ray actors and tasks, with a limit to restarts."""

import warnings
from collections.abc import Callable
from typing import Any

import ray
from ray.util.annotations import RayDeprecationWarning

from spin_ray.config.sections import ResourcesConfig


def map_by_actors(
    items: list[dict[str, Any]],
    actor: type,
    arguments: tuple[Any, ...],
    resources: ResourcesConfig,
    *,
    replicas: int,
    restarts: int,
    place: Callable[[], dict[str, Any]] = dict,
) -> ray.data.Dataset:
    """Returns a data set that calls ``actor(*arguments)`` on each item, once its rows are read.

    Args:
        restarts: further processes for a dead actor, and as many again while it loads.
        place: returns further options of Ray, called once for each actor.
    """
    # Counts processes that die while they load; `max_restarts` is for those that have loaded.
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = restarts
    with warnings.catch_warnings():
        # ray_remote_args_fn goes in Ray 2.64; no other argument says how often an actor is started again.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.from_items(items, override_num_blocks=len(items)).map(
            actor,  # pyrefly: ignore[bad-argument-type] (an actor class; Ray annotates functions only)
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(
                size=min(replicas, len(items)),
                max_tasks_in_flight_per_actor=2,  # no node that joins can take what is queued
            ),
            # Ray Data's own is no limit: an actor that runs out of memory would be started for ever.
            ray_remote_args_fn=lambda: {"max_restarts": restarts, **place()},
            **_asked(resources),
        )


def task_options(resources: ResourcesConfig, *, retries: int) -> dict[str, Any]:
    return _asked(resources) | {"max_retries": retries}


def _asked(resources: ResourcesConfig) -> dict[str, Any]:
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus or None,
        "resources": resources.custom or None,
        "label_selector": resources.labels or None,
        # Set before the process starts: libraries read it when they are loaded, and the driver's value is its own.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(resources.threads)}},
    }
