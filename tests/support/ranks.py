"""Processes of one torch process group, forked off a server that has imported what they need.

A rank that is spawned imports torch and transformers again, which takes longer than what most tests do with it.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# The server imports these before it forks. They start no thread, which a fork would lose.
import spin_ray.learner.backends.fsdp2  # noqa: F401
import tests.support.learner_cases  # noqa: F401


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Calls ``function(rank, *arguments)`` in ``count`` processes; raises what one of them raised."""
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")
