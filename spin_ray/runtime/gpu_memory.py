"""Waits for GPU memory that an ended process still holds.

NVML is asked, because CUDA's own numbers need a context in this process.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError
from spin_ray.runtime.cgroups import memory_limit
from spin_ray.runtime.gpu import runs_elsewhere

WAIT_S = 120.0
"""Longest wait, in seconds; a killed process returns its memory within seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    name: str
    kind: str = ""
    total: int
    free: int
    """Bytes, like ``total``."""
    processes: tuple[str, ...] = ()
    """E.g. ``process 4711 (70.1 GiB)``. Empty where NVML lists none, as in some containers."""


Look = Callable[[int | None], Sequence[Card]]
"""Function that returns this process's first N cards; None: all."""


def wait_for_memory(
    fraction: float, setting: str, cards: int | None = None, *, wait_s: float = WAIT_S, look: Look | None = None
) -> None:
    """Waits until ``fraction`` of each card's memory is free; returns at once if NVML knows no card.

    Raises:
        StageError: still taken after ``wait_s`` seconds; names ``setting``, which asks for ``fraction``.
    """
    look = look or visible_cards
    deadline = time.monotonic() + wait_s
    while short := [card for card in look(cards) if card.free < fraction * card.total]:
        if time.monotonic() >= deadline:
            raise StageError(f"after {wait_s:.0f} s, {'; '.join(_missing(card, fraction, setting) for card in short)}")
        time.sleep(0.5)


def largest_card(config: SpinConfig) -> int | None:
    """Returns the bytes of this machine's largest GPU; None without one, on a cluster, or if training uses none."""
    if not config.train.resources.gpus or runs_elsewhere(config):
        return None
    return max((card.total for card in visible_cards()), default=None)


def memory_here(config: SpinConfig) -> int | None:
    """Returns the bytes of memory that this process may have; None on a cluster."""
    if runs_elsewhere(config):
        return None
    from ray._common.utils import get_system_memory

    whole, limit = get_system_memory(), memory_limit()
    return whole if limit is None else min(whole, limit)


def visible_cards(count: int | None = None) -> list[Card]:
    """Returns the cards of $CUDA_VISIBLE_DEVICES, which Ray sets for each worker."""
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_card(pynvml, name) for name in _visible_names(pynvml.nvmlDeviceGetCount())[:count]]
    except pynvml.NVMLError:  # a slice of a card (MIG), or a container without the right to look
        return []
    finally:
        pynvml.nvmlShutdown()


def _visible_names(count: int) -> list[str]:
    """Returns numbers or UUIDs. Like CUDA, stops at the first invalid one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in visible.split(",")]
    known = [bool(name) and not name.startswith("-") for name in names]
    return names[: known.index(False)] if False in known else names


def _card(nvml: Any, name: str) -> Card:
    handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    memory, kind = nvml.nvmlDeviceGetMemoryInfo(handle), _text(nvml.nvmlDeviceGetName(handle))
    return Card(
        name=f"GPU {name} ({kind})",
        kind=kind,
        total=memory.total,
        free=memory.free,
        processes=_processes(nvml, handle),
    )


def _processes(nvml: Any, handle: Any) -> tuple[str, ...]:
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return ()
    return tuple(
        f"process {process.pid}" + (f" ({_gib(process.usedGpuMemory)})" if process.usedGpuMemory else "")
        for process in found
        if process.pid != os.getpid()
    )


def _missing(card: Card, fraction: float, setting: str) -> str:
    held = f", held by {', '.join(card.processes)}" if card.processes else ""
    return (
        f"{card.name}: {_gib(card.free)} of {_gib(card.total)} are free{held}, but {setting} {fraction:g} asks for "
        f"{_gib(fraction * card.total)}; end the other process or lower {setting}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
