"""The conditions of an lm-eval result; results of others are not comparable."""

from typing import Any

Result = dict[str, Any]
_SHARED = ("backend", "dtype", "engine", "max_length", "chat")
"""Conditions that the tasks of one mean share. Each task has its own examples and version."""


def shared_conditions(result: Result) -> Result:
    """Returns the conditions that a preset's tasks must share; an endpoint's address is none of them."""
    found = {name: result.get(name) for name in _SHARED}
    return found | ({"backend": "endpoint"} if "/" in (found["backend"] or "") else {})


def differing(results: list[Result]) -> list[str]:
    """Returns the names of conditions that the results do not share."""
    every = [shared_conditions(result) for result in results]
    return [name for name in _SHARED if len({it[name] for it in every}) > 1]


def in_words(task: str, result: Result) -> str:
    """Returns the task with its conditions, e.g. ``gsm8k, hf, float32, chat, first 100 rows``."""
    found = shared_conditions(result)
    words = [found["backend"], found["dtype"], found["engine"]]
    words += [f"{found['max_length']} tokens" if found["max_length"] else None]
    words += ["chat" if found["chat"] else None, f"first {result['limit']} rows" if result.get("limit") else None]
    return ", ".join([task, *(word for word in words if word)])
