"""Rare garbage collection during imports: torch, transformers and vLLM make half a million lasting objects.

Processes that train, generate or serve return to Python's default afterwards, because a search of 100,000 new objects
delays every answer. Other processes make few cycles.
"""

import gc
import sys

_RARELY = (100_000, 50, 10)
_AS_USUAL = (2000, 10, 10) if sys.version_info >= (3, 13) else (700, 10, 10)
"""Python's defaults, which cannot be read after Ray's hook."""


def collect_rarely() -> None:
    """Collects once in 100,000 new objects; an embedded Ray calls this when a process starts."""
    gc.set_threshold(*_RARELY)


def skip_imports() -> None:
    """Excludes present objects from collection. A second call does nothing, as it would hide garbage."""
    if not gc.get_freeze_count():
        gc.freeze()


def collect_as_usual() -> None:
    """Restores Python's default and excludes present objects; call it after the imports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_AS_USUAL)
    gc.enable()
