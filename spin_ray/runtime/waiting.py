"""Waits for Ray, with time limits."""

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.errors import StageError
from spin_ray.runtime.actors import task_options
from spin_ray.runtime.autoscaler import asking
from spin_ray.runtime.placement import covers, demands, in_the_cluster, lack_of, request_now, shown, total_of

Row = TypeVar("Row")


def wait_until_free(config: SpinConfig, stage: str, what: str) -> None:
    """Waits until the resources that ``stage`` needs are there and free.

    Nodes that were lost, or given back while they were idle, are asked for again and waited for as at the start of a
    run. No placement group is there yet whose demand an autoscaler could see.

    Raises:
        StageError: not free after the section's ``start_timeout_s``, where nodes are missing after
            ``cluster.wait_for_nodes_s`` if that is longer.
    """
    limit_s = (config.train if stage == "train" else config.generation).start_timeout_s
    grows_s, begun = config.cluster.wait_for_nodes_s, time.monotonic()
    needed = total_of(demands(config)[stage])
    if not covers(ray.available_resources(), needed):
        gc.collect()  # a failed data set's error keeps its actors in a reference cycle
    with asking() as ask:
        while (lack := lack_of(config, stage)) or not covers(ray.available_resources(), needed):
            if lack and grows_s:
                limit_s = max(limit_s, grows_s)
                ask(request_now(config))
            if time.monotonic() > begun + limit_s:
                raise StageError(_still_waiting(what, limit_s, needed, lack, asked=grows_s > 0))
            time.sleep(2 if lack else 0.1)


def _still_waiting(what: str, waited_s: float, needed: dict[str, float], lack: str | None, *, asked: bool) -> str:
    said = f"{what}: waited {waited_s:.0f} s for {shown(needed)} to be free; {in_the_cluster()}"
    if not lack:
        return said
    return f"{said}; {lack}{'' if asked else ' (an autoscaler is asked only with cluster.wait_for_nodes_s)'}"


def wait_for_a_task(resources: ResourcesConfig, limit_s: float, what: str) -> None:
    """Waits until a task with ``resources`` has run. Until then it is a demand that an autoscaler sees.

    Raises:
        StageError: it has not run after ``limit_s``; says that ``what`` waited.
    """
    task = ray.remote(_do_nothing).options(**task_options(resources)).remote()
    try:
        ray.get(task, timeout=limit_s)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(task)
        wanted = shown(resources.bundle)
        raise StageError(f"{what}: waited {limit_s:.0f} s for {wanted} to be free; {in_the_cluster()}") from error


def _do_nothing() -> None:
    pass


def with_deadline(rows: Iterable[Row], first_s: float, next_s: float, what: str) -> Iterator[Row]:
    """Yields ``rows``, read in another thread.

    Raises:
        StageError: no first row within ``first_s`` seconds, or no further row within ``next_s``.
    """
    done = object()
    arrived: queue.Queue[Any] = queue.Queue()

    def pump() -> None:
        try:
            for row in rows:
                arrived.put(row)
            arrived.put(done)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=pump, name=what, daemon=True).start()
    timeout_s = first_s
    while True:
        try:
            item = arrived.get(timeout=timeout_s)
        except queue.Empty:
            raise StageError(f"waited {timeout_s:.0f} s for {what}; {in_the_cluster()}") from None
        if item is done:
            return
        if isinstance(item, BaseException):
            raise item
        timeout_s = next_s
        yield item


def while_it_moves(call: Callable[[], Row], progress: Callable[[], Any], limit_s: float, what: str) -> Row:
    """Returns the result of ``call``, run in another thread.

    Raises:
        StageError: ``progress()`` was the same for ``limit_s`` seconds; the thread ends with the driver.
    """
    ended: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=run, name=what, daemon=True).start()
    seen, since = progress(), time.monotonic()
    while True:
        try:
            result, error = ended.get(timeout=min(limit_s / 4, 30))
        except queue.Empty:
            if (now := progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > limit_s:
                raise StageError(
                    f"waited {limit_s:.0f} s for {what}; {in_the_cluster()}; run the command again to go on"
                ) from None
            continue
        if error is not None:
            raise error
        return result
