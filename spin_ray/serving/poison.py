"""Requests that were being served when an engine died."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

POISON_S = 300.0
"""Seconds for which such requests are refused."""
_NOT_CONTENT = ("model", "stream", "stream_options")


class PoisonList:
    """Digests of such requests, without their text."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def add(self, digest: str) -> None:
        now = self._clock()
        self._until = {known: until for known, until in self._until.items() if until > now}
        self._until[digest] = now + POISON_S

    def wait_s(self, digest: str) -> float:
        """Returns the seconds for which a request is still refused, or 0."""
        return max(0.0, self._until.get(digest, 0.0) - self._clock())


def request_digest(operation: str, fields: dict[str, Any]) -> str:
    """Returns a digest of the content, the same for every model."""
    content = {key: value for key, value in fields.items() if key not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps([operation, content], sort_keys=True).encode()).hexdigest()
