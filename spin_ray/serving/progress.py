"""Progress of a server on stderr: the states of its engines."""

import queue
import sys
import time
from contextlib import suppress
from typing import Any

from ray import serve

from spin_ray.config.sections import ServingConfig
from spin_ray.errors import StageError
from spin_ray.serving.app import APP
from spin_ray.serving.engines import RUN
from spin_ray.serving.front import Front, serve_logs

_LOOK_S = 1.0


class Progress:
    def __init__(self, serving: ServingConfig, front: Front | None = None) -> None:
        host = f"[{serving.host}]" if ":" in serving.host else serving.host
        self._url, self._front = f"http://{host}:{front.port if front else serving.port}", front
        self._began, self._is_up, self._ready = time.monotonic(), False, False
        self._told: dict[str, str] = {}
        self._failed: dict[str, str] = {}

    def follow(self, stop: "queue.SimpleQueue[int]") -> None:
        """Prints the engines' changes until a signal comes.

        Raises:
            StageError: the server was deleted, or has ended.
        """
        self._print(f"logs: {serve_logs()}{'' if self._front else ' of each node'}")
        keeper = serve.get_deployment_handle("keeper", APP)
        table: dict[str, Any] = {
            "engines": {},
            "problems": {},
            "troubles": {},
            "failures": {},
            "starting": {},
        }
        while True:
            with suppress(queue.Empty):
                stop.get(timeout=_LOOK_S)
                return
            try:
                table = keeper.table.remote(-1, 0.0).result(timeout_s=5)
            except Exception as error:  # the keeper restarts, and the last table holds, unless the server was deleted
                if APP not in serve.status().applications:  # asked only here: it costs CPU that answers need
                    raise StageError("the server was deleted by somebody else") from error
            for line in self.lines(table):
                self._print(line)

    def _print(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s  {line}", file=sys.stderr, flush=True)

    def lines(self, table: dict[str, Any]) -> list[str]:
        """Returns what is new in the keeper's table since the last call."""
        now = {name: f"does not serve: {reason}" for name, reason in table["problems"].items()}
        now |= table["starting"] | dict.fromkeys(table["engines"], "ready")
        now |= table["troubles"]
        new = [f"{name}: {state}" for name, state in now.items() if self._told.get(name) != state]
        new += [f"{name}: {text}" for name, text in table["failures"].items() if self._failed.get(name) != text]
        if RUN in self._told and RUN not in now:
            new.append(f"{RUN}: is followed again")
        self._told, self._failed = now, table["failures"]
        if not self._is_up and (self._front is None or self._front.answers):
            self._is_up = True
            new.insert(0, f"{self._url} has the page; models start")
        if not self._ready and self._is_up and any(state == "ready" for state in now.values()):
            self._ready = True
            new.append(f"{self._url} answers; Ctrl-C stops it")
        return new
