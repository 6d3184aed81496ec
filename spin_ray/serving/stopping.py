"""The end of a server: running answers end first, unless a second signal comes."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray import serve
from ray._private import worker
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

logger = logging.getLogger(__name__)

REPLICA = "SERVE_REPLICA::"
"""Prefix of Ray Serve's actors: ``SERVE_REPLICA::APPLICATION#DEPLOYMENT#ID``."""
_LOOK_S = 0.2
_LAST_S = 5.0
"""Seconds for Ray Serve itself to end after its replicas were killed."""


def stop_serving(
    app: str,
    engines: str,
    longest_s: float,
    stop: queue.SimpleQueue[int] | None = None,
    first: Callable[[], None] | None = None,
) -> None:
    """Calls ``first``, deletes ``app``, then its engines; stops Ray Serve if no other application is left.

    Answers have ``longest_s`` to end. A signal in ``stop`` ends the replicas at once.
    """
    work = threading.Thread(target=_stop, args=(app, engines, longest_s, first), daemon=True)
    work.start()
    while work.is_alive():
        if stop is not None and not stop.empty():
            logger.warning("stopping at once: answers are cut off")
            _kill(app, engines)
            work.join(_LAST_S)
            return
        work.join(_LOOK_S)


def _stop(app: str, engines: str, longest_s: float, first: Callable[[], None] | None) -> None:
    try:
        if first:
            first()
        _delete([app], longest_s)
        names = list(serve.status().applications)
        _delete([name for name in names if name.startswith(engines)], longest_s)
        if not [name for name in names if not name.startswith(engines)]:
            printed = worker._worker_logs_enabled
            worker._worker_logs_enabled = False  # Ray would print that calls end with the controller
            try:
                serve.shutdown()
            finally:
                worker._worker_logs_enabled = printed
    except (RayError, RayServeException, ConnectionError) as error:  # Ray is gone, and all replicas with it
        logger.warning("Ray Serve has ended before its applications: %s", error)


def _delete(names: list[str], longest_s: float) -> None:
    """Deletes applications and waits; Ray Serve's own wait ends after 60 s, with an error."""
    for name in names:
        serve.delete(name, _blocking=False)
    end = time.monotonic() + longest_s
    while any(name in serve.status().applications for name in names) and time.monotonic() < end:
        time.sleep(_LOOK_S)


def _kill(app: str, engines: str) -> None:
    with suppress(RayError, RayServeException):
        names = [name for name in serve.status().applications if name == app or name.startswith(engines)]
        for name in names:
            serve.delete(name, _blocking=False)  # nothing starts again
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["name"].removeprefix(REPLICA).partition("#")[0] in names:
                with suppress(ValueError):  # it has just ended
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
