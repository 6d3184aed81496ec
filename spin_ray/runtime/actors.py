"""Ray Data actors and Ray tasks with limited restarts."""

import warnings
from collections.abc import Callable
from typing import Any

import ray
from ray._private.worker import global_worker
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
    """Returns a lazy data set; reading it calls ``actor(*arguments)`` on each item.

    Args:
        restarts: most restarts of a dead actor. As many actors in a row may also die while they load.
        place: returns further Ray options, once for each actor.
    """
    # Limits actors that die while they load; `max_restarts` counts only for an actor that has loaded.
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = restarts
    with warnings.catch_warnings():
        # Ray 2.64 removes ray_remote_args_fn, but no other argument limits the restarts of an actor.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.from_items(items, override_num_blocks=len(items)).map(
            actor,  # pyrefly: ignore[bad-argument-type] (an actor class; Ray annotates functions only)
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(
                size=min(replicas, len(items)),
                max_tasks_in_flight_per_actor=2,  # a node that joins later cannot take queued items
            ),
            # Ray Data's default is no limit: an actor that runs out of memory would restart forever.
            ray_remote_args_fn=lambda: {"max_restarts": restarts, **place()},
            **_asked(resources),
        )


def map_by_tasks(
    items: list[dict[str, Any]], function: Callable[[dict[str, Any]], dict[str, Any]], *, retries: int
) -> ray.data.Dataset:
    """Returns a lazy data set; reading it calls ``function`` on each item in a task with one CPU.

    Args:
        retries: most further tries of a task whose process dies. Ray sets no limit to those that its memory monitor
            kills, which ``earlier_tries`` counts, too.
    """
    with warnings.catch_warnings():
        # Ray 2.64 removes ray_remote_args. Ray Data's default is no limit: a process that crashes would start forever.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.from_items(items, override_num_blocks=len(items)).map(function, num_cpus=1, max_retries=retries)


def earlier_tries() -> int:
    """Returns how many processes died with this Ray task; 0 outside of Ray."""
    if not ray.is_initialized():
        return 0
    return global_worker.core_worker.get_current_task_attempt_number()  # pyrefly: ignore[missing-attribute] (set by Ray)


def task_options(resources: ResourcesConfig) -> dict[str, Any]:
    """Returns Ray's options of a task that is never tried again."""
    return _asked(resources) | {"max_retries": 0}


def _asked(resources: ResourcesConfig) -> dict[str, Any]:
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus or None,
        "resources": resources.custom or None,
        "label_selector": resources.labels or None,
        # Set before the process starts, as libraries read it when they load. The driver's value may differ.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(resources.threads)}},
    }
