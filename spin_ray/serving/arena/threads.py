"""Calls of the votes' database from the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from spin_ray.serving.arena.votes import unavailable

THREADS = 4
WAIT_S = 3.0
"""Longest wait for a call; includes the wait for a free thread."""
T = TypeVar("T")


class VoteThreads:
    """Threads for the votes' database alone. A locked database delays no other route."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "votes")

    async def run(self, call: Callable[..., T], *given: object) -> T:
        """Runs ``call(*given)`` in a thread. A call that has begun goes on after a refusal.

        Raises:
            Refusal: there is no answer within ``WAIT_S`` (503).
        """
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.get_running_loop().run_in_executor(self._pool, partial(call, *given))
        except TimeoutError:
            raise unavailable("the database does not answer") from None
