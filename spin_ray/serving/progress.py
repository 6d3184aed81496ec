"""Progress of a server, on stderr: which engine is placed, loads, answers, and after how many seconds."""

import queue
import sys
import time
from contextlib import suppress
from typing import Any

from ray import serve

from spin_ray.config.sections import ServingConfig
from spin_ray.errors import StageError
from spin_ray.serving.app import APP
from spin_ray.serving.front import Front
from spin_ray.serving.keeper import ENGINE_PREFIX

_LOOK_S = 1.0


class Progress:
    """The last state of each engine that the user was told."""

    def __init__(self, serving: ServingConfig, front: Front | None = None) -> None:
        self._url, self._front = f"http://{serving.host}:{serving.port}", front
        self._began, self._told, self._ready = time.monotonic(), dict[str, str](), False

    def follow(self, stop: "queue.SimpleQueue[int]") -> None:
        """Tells what changes until a signal comes.

        Raises:
            StageError: the server was deleted, or has ended.
        """
        table: dict[str, Any] = {"engines": {}, "problems": {}, "down": []}
        while True:
            with suppress(queue.Empty):
                stop.get(timeout=_LOOK_S)
                return
            applications = serve.status().applications
            if APP not in applications:
                raise StageError("the server was deleted by somebody else")
            with suppress(Exception):  # the keeper restarts; the last table holds
                table = serve.get_deployment_handle("keeper", APP).table.remote(-1, 0.0).result(timeout_s=5)
            for line in self.lines(applications, table):
                print(f"{time.monotonic() - self._began:5.0f} s  {line}", file=sys.stderr, flush=True)

    def lines(self, applications: dict[str, Any], table: dict[str, Any]) -> list[str]:
        """Returns what is new since the last call."""
        now = {name: f"does not serve: {reason}" for name, reason in table["problems"].items()}
        for app, found in applications.items():
            if app.startswith(ENGINE_PREFIX):
                inside = [name for name, engine in table["engines"].items() if engine.get("app") == app]
                for name in inside or [app.removeprefix(ENGINE_PREFIX).partition(".")[0]]:
                    now.setdefault(name, _state(name, found, table))
        new = [f"{name}: {state}" for name, state in now.items() if self._told.get(name) != state]
        self._told = now
        answers = self._front is None or self._front.answers
        if not self._ready and answers and any(state == "ready" for state in now.values()):
            self._ready = True
            new.append(f"{self._url} answers; Ctrl-C stops it")
        return new


def _state(name: str, application: Any, table: dict[str, Any]) -> str:
    if name in table["down"]:
        return "its engine has ended and starts again"
    if name in table["engines"]:
        return "ready"
    if application.status.value == "RUNNING":
        return "loaded, answers probes"
    started = any(deployment.replica_states for deployment in application.deployments.values())
    return "placed, loads" if started else "waits for a place"
