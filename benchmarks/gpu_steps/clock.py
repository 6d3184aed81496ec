"""Time and memory of work on a device."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from gpu_steps.child import Context


def synchronise(context: Context) -> None:
    if not context.tiny:
        torch.cuda.synchronize()


def seconds_of(context: Context, work: Callable[[], Any], *, warm_up: int, times: int) -> float:
    """Returns the median seconds of a call, waiting for the device before and after."""
    spent = []
    for number in range(warm_up + times):
        synchronise(context)
        started = time.perf_counter()
        work()
        synchronise(context)
        if number >= warm_up:
            spent.append(time.perf_counter() - started)
    return median(spent)


def peak_gb(context: Context) -> float:
    """Returns the peak memory of tensors since the item began, GB; 0 on a CPU."""
    return 0.0 if context.tiny else torch.cuda.max_memory_allocated() / 1e9
