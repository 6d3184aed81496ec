"""Columns of each form -> messages."""

from collections.abc import Callable
from typing import Any, NamedTuple

from spin_ray.inputs.messages import ROLES, Message, Unusable, decoded, is_message, listed, parse_messages, unpacked

Columns = dict[str, Any]
"""A row: values by column."""


class Exchange(NamedTuple):
    messages: list[Message]
    """The conversation; its responses are the human ones."""
    rejected: list[Message] | None = None
    """The conversation with the worse response."""


def _conversation(prompt: Any, response: Any, system: Any = None) -> list[Message]:
    """Returns the messages of a prompt and a response, each a text or a list of messages."""
    before, after = _spoken(prompt, "prompt", "user"), _spoken(response, "response", "assistant")
    return _with_system(parse_messages([*before, *after]), system)


def _spoken(value: Any, column: str, role: str) -> list[Any]:
    """Returns the messages of a column that holds a text, a message, a list of messages, or JSON text of these."""
    value = unpacked(value)
    if is_message(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        raise Unusable("malformed", f"{column}: expected a text or messages, found a list of {len(value)} texts")
    return listed(value, column) if isinstance(value, list | dict) else [{"role": role, "content": value}]


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if system is None or system == "":
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] == system:
            return messages
        raise Unusable("malformed", "has a column system and another system message")
    return parse_messages([{"role": "system", "content": system}, *messages])


def read_messages(row: Columns) -> Exchange:
    return Exchange(parse_messages(listed(row["messages"], "messages")))


def read_sharegpt(row: Columns) -> Exchange:
    return Exchange(_with_system(parse_messages(listed(row["conversations"], "conversations")), row.get("system")))


def read_alpaca(row: Columns) -> Exchange:
    """Joins instruction and input by an empty line; ``history`` holds earlier pairs of instruction and output."""
    return Exchange(_conversation(_instructed(row), row["output"], row.get("system")))


def read_alpaca_preferred(row: Columns) -> Exchange:
    asked, system, rejected = _instructed(row), row.get("system"), row.get("rejected")
    return Exchange(
        _conversation(asked, row["chosen"], system),
        None if rejected is None else _conversation(asked, rejected, system),
    )


def _instructed(row: Columns) -> list[Message]:
    asked, extra = row["instruction"], row.get("input")
    if not isinstance(asked, str) or not isinstance(extra, str | None):
        raise Unusable("malformed", "instruction and input must be text")
    if extra and extra.strip():
        asked = f"{asked}\n\n{extra}" if asked.strip() else extra
    before = []
    history = decoded(row.get("history")) or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unusable("malformed", "history must hold pairs of instruction and output")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*before, {"role": "user", "content": asked}]


def answered(asks: str, response: str) -> Callable[[Columns], Exchange]:
    return lambda row: Exchange(_conversation(row[asks], row[response], row.get("system")))


def preferred(asks: str) -> Callable[[Columns], Exchange]:
    def read(row: Columns) -> Exchange:
        rejected, system = row.get("rejected"), row.get("system")
        return Exchange(
            _conversation(row[asks], row["chosen"], system),
            None if rejected is None else _conversation(row[asks], rejected, system),
        )

    return read


def read_sharegpt_preferred(row: Columns) -> Exchange:
    """Reads LLaMA-Factory's preference rows: ``chosen`` and ``rejected`` are a message each."""
    asked, system = listed(row["conversations"], "conversations"), row.get("system")
    rejected = unpacked(row.get("rejected"))
    return Exchange(
        _conversation(asked, [row["chosen"]], system),
        None if rejected is None else _conversation(asked, [rejected], system),
    )


def both(better: str, worse: str) -> Callable[[Columns], Exchange]:
    def read(row: Columns) -> Exchange:
        rejected = row.get(worse)
        return Exchange(
            parse_messages(listed(row[better], better)),
            None if rejected is None else parse_messages(listed(rejected, worse)),
        )

    return read


def is_conversation(value: Any) -> bool:
    """Tells whether a value is a list of messages that begins before the response."""
    if isinstance(value, dict):
        value = listed(value, "") if value and all(isinstance(each, list) for each in value.values()) else [value]
    if not isinstance(value, list):
        return False
    first = value[0] if value else None
    said = isinstance(first, dict) and (first.get("role") or first.get("from"))
    return not (isinstance(said, str) and ROLES.get(said.lower()) == "assistant")
