"""Requests of which engines die."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

POISON_S = 300.0
"""Seconds for which such a request is refused, and most seconds between the two deaths that show it."""
_NOT_CONTENT = ("model", "stream", "stream_options")


@dataclass(frozen=True, eq=False)
class Served:
    """A request that an engine serves."""

    engine: str
    digest: str
    since: float


class PoisonList:
    """Digests of such requests, without their text.

    Such a request was being served at two deaths, or was the only one at a death. Of many requests at one death nearly
    all are innocent.
    """

    def __init__(self, *, sees_all: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes an empty list.

        Args:
            sees_all: tells whether all requests of the engines pass here. Else none counts as the only one.
        """
        self._sees_all, self._clock = sees_all, clock
        self._served: set[Served] = set()
        self._died_at: dict[str, float] = {}
        self._met_at: dict[str, float] = {}
        """Time at which each digest was first involved in a death, for ``POISON_S``."""
        self._until: dict[str, float] = {}

    @contextmanager
    def serving(self, engine: str, digest: str) -> Iterator[Served]:
        """Counts a request among those that ``engine`` serves."""
        request = Served(engine, digest, self._clock())
        self._served.add(request)
        try:
            yield request
        finally:
            self._served.remove(request)

    def note_death(self, request: Served) -> bool:
        """Notes that the engine died while it served ``request``; returns whether the request is refused from now on.

        Each request of one death is noted. Those that began before a death was noted belong to it.
        """
        now = self._clock()
        self._met_at = {digest: at for digest, at in self._met_at.items() if now - at < POISON_S}
        self._until = {digest: until for digest, until in self._until.items() if until > now}
        is_first = request.since > self._died_at.get(request.engine, -math.inf)
        if is_first:
            self._died_at[request.engine] = now
        others = {other.digest for other in self._served if other.engine == request.engine} - {request.digest}
        met_at = self._met_at.setdefault(request.digest, now)
        if request.since > met_at or (is_first and self._sees_all and not others):
            self._until[request.digest] = now + POISON_S
        return request.digest in self._until

    def wait_s(self, digest: str) -> float:
        """Returns the seconds for which a request is still refused, or 0."""
        return max(0.0, self._until.get(digest, 0.0) - self._clock())


def request_digest(operation: str, fields: dict[str, Any]) -> str:
    """Returns a digest of the content, the same for every model."""
    content = {key: value for key, value in fields.items() if key not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps([operation, content], sort_keys=True).encode()).hexdigest()
