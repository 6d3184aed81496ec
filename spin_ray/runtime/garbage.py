"""Keeps Python's search for cycles away from imports.

Imports of torch, transformers and vLLM make half a million objects that stay. Python's default searches them again and
again meanwhile. Processes that train, generate or serve search as usual afterwards: a search among 100,000 new objects
stops every answer for 0.2 s. Other processes make few cycles, and search rarely for ever.
"""

import gc
import sys

_RARELY = (100_000, 50, 10)
_AS_USUAL = (2000, 10, 10) if sys.version_info >= (3, 13) else (700, 10, 10)
"""Python's own thresholds. They cannot be read: the hook of Ray comes first."""


def collect_rarely() -> None:
    """Searches once in 100,000 new objects; an embedded Ray calls it when a process starts."""
    gc.set_threshold(*_RARELY)


def skip_imports() -> None:
    """Takes what was imported out of every search; does nothing a second time, as it would hide garbage."""
    if not gc.get_freeze_count():
        gc.freeze()


def collect_as_usual() -> None:
    """Searches as Python does by default, and never again among the objects of now; call it after the imports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_AS_USUAL)
    gc.enable()
