"""Columns of each form -> messages."""

from collections.abc import Callable
from typing import Any, NamedTuple

from spin_ray.inputs.messages import (
    ROLES,
    Message,
    Unusable,
    decoded,
    is_message,
    listed,
    parse_messages,
    refuse_python_text,
    spoken,
    unpacked,
)  # fmt: skip

Columns = dict[str, Any]
"""A row: values by column."""


class Exchange(NamedTuple):
    messages: list[Message]
    """Conversation with the human response."""
    rejected: list[Message] | None = None
    """Conversation with the worse response."""


def _exchange(row: Columns, asks: str, response: str, asked: list[Message] | None = None) -> Exchange:
    """Joins prompt and response, and ``rejected`` beside ``chosen``; ``asked`` replaces a prompt of text."""
    prompt, system = (row[asks] if asked is None else ""), row.get("system")
    real, worse = unpacked_responses(prompt, row[response], row.get("rejected") if response == "chosen" else None)
    before = _spoken(unpacked(prompt) if asked is None else asked, asks, "user", 0)
    after = _spoken(real, response, "assistant", len(before))
    rejected = None if worse is None else _spoken(worse, "rejected", "assistant", len(before))
    if before or system is None:  # both conversations share the messages before the response
        before, system = _with_system(before, system), None
    return Exchange(
        _with_system([*before, *after], system),
        None if rejected is None else _with_system([*before, *rejected], system),
    )


def unpacked_responses(prompt: Any, response: Any, worse: Any) -> tuple[Any, Any]:
    """Parses responses that are messages stored as JSON text; returns others unchanged.

    JSON text is what a model may be asked to write. It is parsed beside a prompt of messages, or if both responses are
    messages.
    """
    found = unpacked(response), unpacked(worse)
    both = all(isinstance(each, list) for each in found)
    return found if both or not isinstance(unpacked(prompt), str) else (response, worse)


def _spoken(value: Any, column: str, role: str, start: int) -> list[Message]:
    if isinstance(value, str):
        refuse_python_text(value, column)
        return [spoken(role, value, start, column)]
    if is_message(value):
        return parse_messages([value], start)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        raise Unusable("malformed", f"{column}: expected a text or messages, found a list of {len(value)} texts")
    if isinstance(value, list | dict):
        return parse_messages(listed(value, column), start)
    return [spoken(role, value, start, column)]


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if system is None or system == "":
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        if isinstance(system, str) and messages[0]["content"].strip() == system.strip():
            return messages
        raise Unusable("malformed", "has a column system and another system message")
    return [spoken("system", system, 0, "system"), *messages]


def read_messages(row: Columns) -> Exchange:
    return Exchange(_with_system(parse_messages(listed(row["messages"], "messages")), row.get("system")))


def read_sharegpt(row: Columns) -> Exchange:
    return Exchange(_with_system(parse_messages(listed(row["conversations"], "conversations")), row.get("system")))


def read_alpaca(row: Columns) -> Exchange:
    """Joins instruction and input by an empty line; ``history`` holds earlier turns."""
    return _exchange(row, "instruction", "output", _instructed(row))


def read_alpaca_preferred(row: Columns) -> Exchange:
    return _exchange(row, "instruction", "chosen", _instructed(row))


def _instructed(row: Columns) -> list[Message]:
    asked, extra = row["instruction"], row.get("input")
    if not isinstance(asked, str) or not isinstance(extra, str | None):
        raise Unusable("malformed", "instruction and input must be text")
    refuse_python_text(asked, "instruction")
    if extra and extra.strip():
        asked = f"{asked}\n\n{extra}" if asked.strip() else extra
    before = []
    history = decoded(row.get("history")) or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(each, str) for each in turn):
            raise Unusable("malformed", "history must hold pairs of texts, instruction and output")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*before, {"role": "user", "content": asked}]


def answered(asks: str, response: str) -> Callable[[Columns], Exchange]:
    return lambda row: _exchange(row, asks, response)


def read_sharegpt_preferred(row: Columns) -> Exchange:
    """Reads LLaMA-Factory's rows, whose ``chosen`` and ``rejected`` are one message each."""
    asked, rejected = listed(row["conversations"], "conversations"), unpacked(row.get("rejected"))
    alone = {"chosen": [row["chosen"]], "rejected": None if rejected is None else [rejected]}
    return _exchange(row | {"conversations": asked} | alone, "conversations", "chosen")


def both(better: str, worse: str) -> Callable[[Columns], Exchange]:
    def read(row: Columns) -> Exchange:
        chosen, messages, system = listed(row[better], better), row.get(worse), row.get("system")
        if messages is None:
            return Exchange(_with_system(parse_messages(chosen), system))
        rejected, shared = listed(messages, worse), len(chosen) - 1
        alike = len(rejected) == len(chosen) and rejected[:-1] == chosen[:-1]
        parsed = parse_messages(chosen)
        other = [*parsed[:-1], *parse_messages(rejected[-1:], shared)] if alike else parse_messages(rejected)
        return Exchange(_with_system(parsed, system), _with_system(other, system))

    return read


def is_conversation(value: Any) -> bool:
    """Returns True for messages of which the first is not the assistant's."""
    if isinstance(value, dict):
        value = listed(value, "") if value and all(isinstance(each, list) for each in value.values()) else [value]
    if not isinstance(value, list):
        return False
    first = value[0] if value else None
    said = isinstance(first, dict) and (first.get("role") or first.get("from"))
    return not (isinstance(said, str) and ROLES.get(said.lower()) == "assistant")
