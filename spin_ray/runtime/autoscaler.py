"""The run's request for nodes, which Ray's autoscaler keeps until the run ends.

Ray Data and Ray Train ask through one actor of the cluster, Ray's AutoscalingCoordinator. It sends the autoscaler all
requests that it knows whenever one changes, and every 20 s. That replaces what was asked for in another way, e.g. by
``ray.autoscaler.sdk.request_resources``. So a run asks through it, too.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from spin_ray.errors import last_line

logger = logging.getLogger(__name__)

Request = list[tuple[dict[str, float], dict[str, str]]]
"""Bundles for the autoscaler, each with the labels of its node."""
Ask = Callable[[Request], None]

RENEW_S = 20.0
"""Seconds between renewals of the request."""
_EXPIRES_S = 180.0
"""Seconds without renewal after which the request ends: the driver was killed. Ray Data and Ray Train take as many."""
_ANSWER_S = 30.0
_ELSEWHERE = "!spin-ray"
_NEVER = 1e9
"""Utilisation, where 1 is all of the cluster."""


def _whole(request: Request) -> Request:
    return request


@dataclass
class _Asking:
    """This driver's request."""

    users: int = 0
    request: Request = field(default_factory=list)
    part: Callable[[Request], Request] = _whole
    """Returns the part that is asked for now."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Ends the thread that renews the request."""


_asking, _lock = _Asking(), threading.RLock()


@contextmanager
def asking() -> Iterator[Ask]:
    """Yields the call that asks for nodes, in place of what was asked for before.

    The request is renewed, and withdrawn when the outermost use ends. A request that fails is logged, and no error.
    """
    _asking.users += 1
    try:
        yield _ask
    finally:
        _asking.users -= 1
        if not _asking.users:
            _ask([])


def keep_ray_data_from_asking() -> None:
    """Sets the utilisation from which Ray Data asks for more nodes to one that is never reached.

    Ray Data would ask for twice the CPUs of a busy cluster, whose nodes have GPUs. Where that exceeds the cluster's
    largest size, the autoscaler heeds no request at all and gives idle nodes back.
    """
    from ray.data._internal.cluster_autoscaler.rate_based_cluster_autoscaler import RateBasedClusterAutoscaler
    from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil

    # Ray reads it from the environment when it is imported, which may be before this package.
    never = ClusterUtil(cpu=_NEVER, gpu=_NEVER, memory=_NEVER, object_store_memory=_NEVER)
    defaults: Any = RateBasedClusterAutoscaler.__init__.__kwdefaults__
    defaults["cluster_scaling_up_util_threshold"] = never


@contextmanager
def only(part: Callable[[Request], Request]) -> Iterator[None]:
    """Asks for ``part`` of the request alone until the context ends."""
    _change(part)
    try:
        yield
    finally:
        _change(_whole)


def _ask(request: Request) -> None:
    with _lock:
        before, _asking.request = _asking.request, request
        if request and not before:
            _asking.ended = threading.Event()
            threading.Thread(target=_renew, args=(_asking.ended,), name="request for nodes", daemon=True).start()
        if before and not request:
            _asking.ended.set()
        if before or request:
            _send()


def _change(part: Callable[[Request], Request]) -> None:
    with _lock:
        _asking.part = part
        if _asking.request:
            _send()


def _renew(ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        with _lock:
            if not ended.is_set():
                _send()


def _send() -> None:
    try:
        send(_asking.part(_asking.request))
    except Exception as error:  # Ray raises many types; the run, or its own error, counts
        logger.warning("the autoscaler could not be asked for nodes: %s", last_line(error))


def send(request: Request) -> None:
    """Gives the request to Ray's coordinator, in place of this driver's last one. An empty one withdraws it.

    Raises:
        Exception: the coordinator did not take it within 30 s.
    """
    from ray.data._internal.cluster_autoscaler import ResourceRequestPriority, get_or_create_autoscaling_coordinator
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import SUBCLUSTER_LABEL_KEY

    coordinator: Any = get_or_create_autoscaling_coordinator()
    driver = f"spin_ray-{ray.get_runtime_context().get_job_id()}"
    if not request:
        ray.get(coordinator.cancel_request.remote(driver), timeout=_ANSWER_S)
        return
    # The coordinator reserves what is asked for, and Ray Data sees the rest. It reserves in the named subcluster, and
    # none has this name. As a selector, which the autoscaler gets, it says "any other" and fits every node.
    has_own = any(SUBCLUSTER_LABEL_KEY in labels for _, labels in request)
    answer = coordinator.request_resources.remote(
        requester_id=driver,
        resources=[bundle for bundle, _ in request],
        label_selectors=[labels for _, labels in request],
        subcluster_selector=None if has_own else {SUBCLUSTER_LABEL_KEY: _ELSEWHERE},
        expire_after_s=_EXPIRES_S,
        priority=ResourceRequestPriority.LOW,
    )
    ray.get(answer, timeout=_ANSWER_S)
