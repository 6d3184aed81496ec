"""Thoughts of reasoning models in rendered text, such as ``<think>…</think>``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
MARKS_OF_THOUGHTS = frozenset(mark for marks in _MARKS for mark in marks)
"""Marks that texts may have, too."""


class Opening(NamedTuple):
    """Thought that a template's prompt opens."""

    text: str
    """End of the prompt, e.g. ``<think>`` and a line break."""
    mark: str
    end: str

    def rest_of(self, said: Mapping[str, Any]) -> str | None:
        """Returns what the model writes behind the prompt to say ``said``; None without a thought."""
        thought, content = said.get("reasoning_content"), said.get("content") or ""
        if isinstance(thought, str) and thought.strip():
            line = "\n" if self.text.endswith("\n") else ""
            content = f"{thought.strip()}{line}{self.end}{line}{line}{content}"
        rest = content.removeprefix(self.text)
        return rest if self.end in rest and self.mark not in rest else None


SWITCHES = ("enable_thinking", "thinking", "enable_reasoning", "reasoning", "think")
"""Template variables that switch thoughts on and off."""


def opening_of(prompt: str) -> Opening | None:
    """Returns the thought that ``prompt`` opens at its end."""
    marks = opened_by(prompt)
    return Opening(prompt[prompt.rindex(marks[0]) :], *marks) if marks else None


def opened_by(prompt: str) -> tuple[str, str] | None:
    """Returns the marks of the thought that ``prompt`` opens at its end."""
    for mark, end in _MARKS:
        if prompt.rstrip().endswith(mark):
            return mark, end
    return None


def thought_of(prompt: str, response: str) -> str | None:
    """Returns the stripped thought at the beginning of a response; None if it is missing or has no end."""
    opened = opened_by(prompt)
    for mark, end in [opened] if opened else _MARKS:
        rest = response.lstrip()
        if opened or rest.startswith(mark):
            thought, closed, _ = rest.removeprefix(mark).partition(end)
            return thought.strip() if closed else None
    return None


def ends_a_thought(text: str) -> str | None:
    """Returns the mark that ends a thought in ``text``."""
    return next((end for _, end in _MARKS if end in text), None)


def parts_around(end: str, text: str) -> list[str]:
    """Returns the stripped texts before, within and behind the thoughts of ``text`` that ``end`` ends."""
    mark = next(mark for mark, other in _MARKS if other == end)
    return [part.strip() for closed in text.split(end) for part in closed.split(mark)]
