"""Keeps Python's search for cycles out of the start of processes.

Imports of torch, transformers and vLLM make half a million objects that stay. Python's default searches them again and
again meanwhile.
"""

import gc

_RARELY = (100_000, 50, 10)


def collect_rarely() -> None:
    """Searches once in 100,000 new objects; Ray calls it when a process starts."""
    gc.set_threshold(*_RARELY)


def collect_as_usual() -> None:
    """Searches as Python does by default, and never again among the objects of now; call it after the imports."""
    gc.freeze()
    gc.set_threshold(700, 10, 10)
