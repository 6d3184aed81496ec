"""The keeper of the engines, which follows ``RUN/LATEST``.

    LATEST moves ─> check digests ─> start beside the old engine ─> probe ─> change the table ─> every ingress reads it
                                                                                  └─> drain and delete the old engine

The old engine stays if any step fails. That of an iterate that was made again is replaced in the same way.
Application names hold digests of weights and settings, so a restarted keeper finds its engines. Those of other settings
answer until their successors do.
"""

import asyncio
import logging
import math
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ReplicaState

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.errors import last_line
from spin_ray.run_dir.run_dir import open_run
from spin_ray.runtime.garbage import collect_as_usual
from spin_ray.serving.deaths import cause_of_death, forget_cause
from spin_ray.serving.engines import CHAT, COMPLETION, ENDED, RUN
from spin_ray.serving.iterates import Iterate, mark_of, open_iterate, wanted
from spin_ray.serving.stopping import REPLICA

logger = logging.getLogger("ray.serve")

ENGINE_PREFIX = "engine."
"""Prefix of the names of engine applications."""
_LOOK_S = 0.5
_COMPARE_S = 30.0
"""Seconds between two looks at the manifests of what serves, which cost a store's requests."""
_FAILURE_S = 60.0
"""Seconds for which the table tells of a failed answer."""
_ERROR = re.compile(r"^((?:\w+\.)*\w+(?:Error|Exception)): (.+)$", re.MULTILINE)
_NO_REASON = "no reason given"
_ENDED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.NOT_STARTED)


class EngineFailed(RuntimeError):
    """An engine that did not start or answer its probe."""


class Keeper:
    """The one actor that starts and retires a server's engines. Every ingress follows its table.

    ``{"keeper": "0c9f…", "run": "/shared/runs/my", "driver": "04000000", "version": 3, "newest": "iter-1",
    "engines": {"iter-1": {"app": "engine.iter-1.5f0c….81bd…", "digest": "5f0c…"}},
    "problems": {"iter-2": "…/model.safetensors: differs from its digest"}, "down": [],
    "troubles": {"run": "cannot be followed ([Errno 116] Stale file handle: '…/LATEST'); trying again"},
    "failures": {"iter-1": "an answer failed (…)"}, "starting": {"iter-3": "placed, loads"},
    "running": ["engine.iter-1.5f0c….81bd…"], "settled": False}``

    ``problems`` are of iterates that do not serve, or not as they are in the run. ``troubles`` pass by themselves: of
    the run (``RUN``) and of each iterate in ``down``. ``failures`` are of answers that failed within ``_FAILURE_S``;
    their texts may cite what a client asked.
    ``driver`` is the Ray job whose process stops the server, if there is one.
    ``running`` includes engines of an earlier keeper (None: not seen yet). ``settled``: nothing starts any more.
    """

    async def __init__(
        self,
        run_folder: str,
        config: SpinConfig,
        engines: str = ENGINE_PREFIX,
        driver: str | None = None,
        holds: bool = False,
    ) -> None:
        """Starts to follow the run.

        Args:
            engines: prefix of the names of the engines' applications.
            holds: True returns only when each wanted iterate serves, by an engine of earlier settings too, or has
                failed, at most ``serving.start_timeout_s`` later. Until then Ray Serve takes the keeper for starting.
        """
        self._loops: tuple[asyncio.Task[None], ...] = ()
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._run, self._config, self._prefix = open_run(run_folder), config, engines
        self._settings = settings_mark(config)
        self._run_folder, self._driver = run_folder, driver
        self._id, self._version = uuid.uuid4().hex, 0
        self._newest: str | None = None
        self._engines: dict[str, dict[str, str]] = {}
        self._marks: dict[str, str | None] = {}
        self._compare_at = -math.inf
        self._problems: dict[str, str] = {}
        self._changed = asyncio.Condition()
        self._retry_at: dict[str, float] = {}
        self._serve_lock = asyncio.Lock()
        self._deploying: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._steps: dict[str, str] = {}
        self._applications: dict[str, Any] = {}
        self._asked_at = -math.inf
        self._calm_replicas: set[str] = set()
        self._seen_running: set[str] = set()
        self._has_seen = self._has_looked = False
        self._latest: str | None = None
        self._looked_for_strays = False
        self._ends: dict[str, str] = {}
        self._failures: dict[str, tuple[str, float]] = {}
        self._unfollowed: str | None = None
        collect_as_usual()
        loop = asyncio.get_running_loop()
        self._loops = (loop.create_task(self._look()), loop.create_task(self._keep()))
        if holds:
            with suppress(TimeoutError):
                async with asyncio.timeout(config.serving.start_timeout_s), self._changed:
                    await self._changed.wait_for(self._has_dealt_with_all)

    def __del__(self) -> None:
        """Ends the keeper's work and leaves its engines, which its successor takes over.

        Ray Serve calls this in the event loop when it stops the keeper. Then it ends the loop's threads, without which
        the work would fail.
        """
        for task in (*self._loops, *self._starting.values(), *self._draining.values()):
            task.cancel()

    async def table(self, known: int, wait_s: float) -> dict[str, Any]:
        """Returns the table once its version differs from ``known``, or after ``wait_s``."""
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._version != known), wait_s)
        return {
            "keeper": self._id,
            "run": self._run_folder,
            "driver": self._driver,
            "version": self._version,
            "newest": self._newest,
            "engines": dict(self._engines),
            "problems": dict(self._problems),
            "down": list(self._ends),
            "troubles": self._ends | ({} if self._unfollowed is None else {RUN: self._unfollowed}),
            "failures": {name: text for name, (text, _) in self._failures.items()},
            "starting": dict(self._steps),
            "running": sorted(self._seen_running) if self._has_seen else None,
            "settled": self._has_looked and not self._steps and self._latest in (self._newest, None),
        }

    async def note_failure(self, name: str, what: str) -> None:
        """Notes that an answer of an iterate failed."""
        self._failures[name] = (f"an answer failed ({what[:500]})", time.monotonic())
        await self._announce()

    def _has_dealt_with_all(self) -> bool:
        return self._has_looked and self._steps.keys() <= self._engines.keys() | self._problems.keys()

    def check_health(self) -> None:
        """Raises RuntimeError if a loop has ended; Ray Serve then restarts the keeper."""
        if any(loop.done() for loop in self._loops):
            raise RuntimeError("a loop of the keeper has ended")

    async def _look(self) -> None:
        """Announces engines that died or came back; Ray Serve restarts them."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                running = await self._running()
                down = {name: engine["app"] for name, engine in self._engines.items() if engine["app"] not in running}
                ends = {name: await self._end(app) for name, app in down.items()}
                for app in running - self._seen_running:
                    await self._forget_cause(app)
            except Exception:
                logger.exception("cannot see the engines; trying again")
                continue
            if down.keys() != self._ends.keys():
                logger.warning("engines that are down: %s", ", ".join(down) or "none any more")
            now = time.monotonic()
            failures = {name: failed for name, failed in self._failures.items() if now - failed[1] < _FAILURE_S}
            seen = (running, ends, failures)
            if seen != (self._seen_running, self._ends, self._failures) or not self._has_seen:
                (self._seen_running, self._ends, self._failures), self._has_seen = seen, True
                await self._announce()

    async def _end(self, app: str) -> str:
        """Says why an engine that serves no more has ended, or why it does not start again, as far as is known.

        Ray Serve is not asked for this: it may take seconds to answer after a death.
        """
        if (failed := _failed_start(self._applications.get(app))) != _NO_REASON:
            return f"its engine has ended and cannot start again ({failed}); trying again"
        cause = await self._cause_of_death(app)
        return f"its engine has ended ({cause}) and starts again" if cause else ENDED

    async def _cause_of_death(self, app: str) -> str:
        return await asyncio.to_thread(cause_of_death, app)

    async def _forget_cause(self, app: str) -> None:
        await asyncio.to_thread(forget_cause, app)

    async def _running(self) -> set[str]:
        """Returns the applications that have a running replica.

        Ray Serve takes up to 10 s to notice a dead replica; Ray forgets its actor's name at once. So Ray Serve is only
        asked if the names have changed since all engines ran.
        """
        actors = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        replicas = {actor["name"] for actor in actors if actor["name"].startswith(REPLICA)}
        alive = {replica.removeprefix(REPLICA).partition("#")[0] for replica in replicas}
        if replicas == self._calm_replicas and self._used() <= self._seen_running:
            return self._seen_running
        if self._seen_running - alive:  # told at once: Ray Serve may take seconds to answer after a death
            return self._seen_running & alive
        running = alive & {
            name
            for name, app in (await self._ask_applications()).items()
            if all(deployment.replica_states.get(ReplicaState.RUNNING) for deployment in app.deployments.values())
        }
        ours = {app for app in alive if app.startswith(self._prefix)}
        self._calm_replicas = replicas if ours | self._used() <= running else set()
        return running

    async def _keep(self) -> None:
        while True:
            unfollowed = None
            try:
                await self._once()
            except Exception as error:  # e.g. storage; serving goes on
                logger.exception("cannot follow the run; trying again")
                unfollowed = f"cannot be followed ({last_line(error)}); trying again"
            if unfollowed != self._unfollowed:
                self._unfollowed = unfollowed
                await self._announce()
            await asyncio.sleep(self._config.serving.follow_interval_s)

    async def _once(self) -> None:
        names, latest = await asyncio.to_thread(wanted, self._run, self._config.serving.models)
        self._latest = latest
        remade = await self._made_again(names)
        for name in names:
            waits = time.monotonic() < self._retry_at.get(name, 0)
            due = name in remade or not self._engines.get(name, {"app": ""})["app"].endswith(self._settings)
            if due and name not in self._starting and not waits:
                self._steps[name] = "its files are checked"
                self._starting[name] = asyncio.get_running_loop().create_task(self._try_start(name))
                self._starting[name].add_done_callback(lambda _, name=name: self._starting.pop(name))
        if past := self._problems.keys() - set(names):
            self._problems = {name: reason for name, reason in self._problems.items() if name not in past}
            await self._announce()
        if latest in self._engines and self._newest != latest:
            self._newest = latest
            await self._announce()
        if not self._has_looked:
            self._has_looked = True
            await self._announce()
        if latest is None or latest in self._engines:
            await self._retire([name for name in self._engines if name not in names])
            await self._remove_strays()

    async def _made_again(self, names: list[str]) -> set[str]:
        """Returns those of ``names`` whose engine holds other weights than the run has by now."""
        if time.monotonic() < self._compare_at:
            return set()
        self._compare_at = time.monotonic() + _COMPARE_S
        served = self._engines.keys() & set(names)
        marks = await asyncio.to_thread(lambda: {name: mark_of(self._run, name) for name in served})
        return {name for name, mark in marks.items() if mark not in (None, self._marks[name])}

    async def _try_start(self, name: str) -> None:
        try:
            mark = await asyncio.to_thread(mark_of, self._run, name)
            iterate = await asyncio.to_thread(open_iterate, self._run, name)
            app = f"{self._prefix}{iterate.engine.name}.{iterate.engine.digest[:16]}.{self._settings}"
            if name not in self._engines and (earlier := await self._of_other_settings(app)):
                self._engines[name], self._marks[name] = {"app": earlier, "digest": iterate.digest}, mark
                await self._announce()
            old = self._engines.get(name)
            if old and iterate.base and iterate.digest != old["digest"]:
                # vLLM would take the earlier adapter's cached prefixes for those of another one under its name.
                raise EngineFailed("it was made again; start the server again, whose engine holds the earlier adapter")
            await self._start(app, iterate)
        except Exception as error:  # must not stop those that serve
            self._retry_at[name] = time.monotonic() + self._config.serving.retry_failed_s
            self._problems[name] = " ".join(str(error).split())[:500]
            what = "serves as before" if name in self._engines else "does not serve"
            logger.error("%s %s: %s", name, what, self._problems[name])
        else:
            self._problems.pop(name, None)
            self._engines[name], self._marks[name] = {"app": app, "digest": iterate.digest}, mark
            logger.info("%s serves (%s)", name, iterate.digest)
            if old:
                self._end_unused({old["app"]})
        self._steps.pop(name, None)
        await self._announce()

    async def _of_other_settings(self, app: str) -> str | None:
        """Returns a running application of the same weights with other settings, if there is one."""
        weights = app.removesuffix(self._settings)
        for other, found in (await self._ask_applications()).items():
            if other.startswith(weights) and other != app and found.status == ApplicationStatus.RUNNING:
                return other
        return None

    async def _tell(self, name: str, step: str) -> None:
        if self._steps.get(name) != step:
            self._steps[name] = step
            await self._announce()

    async def _start(self, app: str, iterate: Iterate) -> None:
        """Starts and probes an engine; deletes it after a failure, unless other iterates may use it."""
        deadline = time.monotonic() + self._config.serving.start_timeout_s
        try:
            async with self._deploying[app]:
                await self._bring_up(app, iterate, deadline)
            await self._tell(iterate.name, "loaded, answers probes")
            await self._probe(app, iterate.name, deadline)
        except EngineFailed:
            if iterate.base is None and app not in self._used():
                await self._ask_serve(serve.delete, app, _blocking=False)
            raise

    async def _bring_up(self, app: str, iterate: Iterate, deadline: float) -> None:
        if await self._status(app) != ApplicationStatus.RUNNING:
            await self._ask_serve(_deploy, app, iterate.engine, self._config, self._run_folder)
        while (status := await self._status(app)) != ApplicationStatus.RUNNING:
            if status in _ENDED:
                raise EngineFailed(f"its engine did not start ({await self._message(app)})")
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"its engine was not ready after serving.start_timeout_s ({status.value}); are "
                    f"{self._config.serving.resources.bundle} free in the cluster?"
                )
            await self._tell(iterate.name, _step(self._applications.get(app)))
            await asyncio.sleep(0.2)

    def _used(self) -> set[str]:
        return {engine["app"] for engine in self._engines.values()}

    async def _probe(self, app: str, name: str, deadline: float) -> None:
        """Asks for real answers: a model that loads may not run, and vLLM compiles sampling at first use."""
        handle: Any = serve.get_app_handle(app).options(stream=True)
        chat = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        scored = {"model": name, "prompt": [1, 1], "max_tokens": 1, "prompt_logprobs": 0}
        for operation, fields in ((CHAT, chat), (CHAT, chat | {"seed": 0}), (COMPLETION, scored)):
            try:
                async with asyncio.timeout(max(1.0, deadline - time.monotonic())):
                    items = [item async for item in handle.answer.remote(operation, fields)]
            except Exception as error:
                raise EngineFailed(f"its engine did not answer a first request ({last_line(error)})") from error
            if "choices" not in items[0]:
                raise EngineFailed(f"its engine refused a first request ({items[0]})")

    async def _retire(self, names: list[str]) -> None:
        if not names:
            return
        apps = {self._engines.pop(name)["app"] for name in names}
        await self._announce()
        self._end_unused(apps)

    def _end_unused(self, apps: set[str]) -> None:
        for app in apps - self._used() - self._draining.keys():
            self._draining[app] = asyncio.get_running_loop().create_task(self._drain(app))
            self._draining[app].add_done_callback(lambda _, app=app: self._draining.pop(app))

    async def _drain(self, app: str) -> None:
        await asyncio.sleep(self._config.serving.drain_grace_s)  # until every ingress replica has the new table
        if app not in self._used():
            await self._ask_serve(serve.delete, app, _blocking=False)
            await self._forget_cause(app)

    async def _remove_strays(self) -> None:
        """Ends unused engines of an earlier keeper, once."""
        if self._looked_for_strays or self._starting:
            return
        self._looked_for_strays = True
        self._end_unused({app for app in await self._ask_applications() if app.startswith(self._prefix)})

    async def _announce(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def _ask_serve(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls Ray Serve in a thread, one call at a time.

        Two at once fail (ray 2.60: "not registered for pickle by value").
        """
        async with self._serve_lock:
            self._asked_at = -math.inf
            return await asyncio.to_thread(function, *arguments, **options)

    async def _ask_applications(self) -> dict[str, Any]:
        """Returns Ray Serve's applications, cached for ``_LOOK_S`` or until the next change: asking costs CPU."""
        async with self._serve_lock:
            if time.monotonic() - self._asked_at > _LOOK_S:
                self._applications = (await asyncio.to_thread(serve.status)).applications
                self._asked_at = time.monotonic()
            return self._applications

    async def _status(self, app: str) -> ApplicationStatus:
        found = (await self._ask_applications()).get(app)
        return found.status if found else ApplicationStatus.NOT_STARTED

    async def _message(self, app: str) -> str:
        found = (await self._ask_applications()).get(app)
        return _reason(*(one.message for one in found.deployments.values()), found.message) if found else _NO_REASON


def settings_mark(config: SpinConfig) -> str:
    """Returns a mark of the settings that engines read. An engine of another mark is replaced."""
    serving = config.serving.model_dump(mode="json", exclude=set(config.serving.not_of_engines))
    engine, model = (section.model_dump(mode="json") for section in (config.serving_engine, config.model))
    return digest([serving, engine, model, config.data.system, config.train.precision])[:8]


def _reason(*messages: str) -> str:
    """Returns the last error in the first of Ray Serve's messages that has one."""
    found = next((lines for message in messages if (lines := _ERROR.findall(message))), [("", _NO_REASON)])
    kind, text = found[-1]
    is_told = kind in ("", "RuntimeError") or kind.startswith("spin_ray.")
    return (text if is_told else f"{kind}: {text}")[:500]


def _failed_start(application: Any) -> str:
    """Returns the last error of a deployment that has no replica running."""
    deployments = application.deployments.values() if application else ()
    return _reason(*(one.message for one in deployments if not one.replica_states.get(ReplicaState.RUNNING)))


def _step(application: Any) -> str:
    placed = application and any(deployment.replica_states for deployment in application.deployments.values())
    return "placed, loads" if placed else "waits for a place"


def _deploy(app: str, iterate: Iterate, config: SpinConfig, run_folder: str) -> None:
    # vLLM's import takes seconds, for which the page must not wait. vLLM's log settings would close Ray Serve's log.
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    from spin_ray.serving.iterate_engine import build_engine

    target = serve.RunTarget(build_engine(iterate, config, run_folder), name=app, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
