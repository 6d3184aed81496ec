"""Thoughts of reasoning models in rendered text, such as ``<think>…</think>``."""

_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
SWITCHES = ("enable_thinking", "thinking", "enable_reasoning", "reasoning", "think")
"""Variables with which chat templates switch thoughts on and off."""


def opened_by(prompt: str) -> tuple[str, str] | None:
    """Returns the marks of the thought that the end of ``prompt`` opens."""
    for mark, end in _MARKS:
        if prompt.rstrip().endswith(mark):
            return mark, end
    return None


def thought_of(prompt: str, response: str) -> str | None:
    """Returns the thought with which a response begins, stripped; None if it has none or does not end it."""
    opened = opened_by(prompt)
    for mark, end in [opened] if opened else _MARKS:
        rest = response.lstrip()
        if opened or rest.startswith(mark):
            thought, closed, _ = rest.removeprefix(mark).partition(end)
            return thought.strip() if closed else None
    return None


def ends_a_thought(text: str) -> str | None:
    """Returns the first end of a thought that ``text`` has."""
    return next((end for _, end in _MARKS if end in text), None)
