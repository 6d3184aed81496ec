"""Messages of data files -> messages with the roles and keys of chat templates."""

import json
import re
from typing import Any

Message = dict[str, Any]
"""Dict with ``role`` and ``content``, and optionally ``tool_calls``, ``tool_call_id``, ``name`` and
``reasoning_content``."""
Conversation = list[Message]
Tools = list[dict[str, Any]] | None
"""JSON schemas of the functions that a conversation may call."""

_NAMES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "output", "function_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
"""Role for each name in data files."""
CALL = "function_call"
"""ShareGPT's role name, and OpenAI's older key, of a tool call."""
_ROLES = ", ".join(_NAMES)
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
"""Keys of a thought; chat templates use the first."""
_LEARNT = ("weight", "train", "training", "loss", "trainable")
"""Keys whose value false (``weight``: also 0) excludes a message from learning."""
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys that a template may write besides role and content."""
_READ = {"role", "from", "content", "value", *KEPT, *REASONING, CALL}
_SAID = {"content", "value", "tool_calls"}
_SHARED = {"human": "user", "gpt": "assistant", "system": "system"}
_PLAIN = ("user", "assistant", "system")
_PYTHON = re.compile(r"\s*(?:array\(\s*)?\[?\s*\{\s*'")
_PYTHON_ROLE = re.compile(rf"'(?:role|from)':\s*'(?:{'|'.join(ROLES)})'", re.IGNORECASE)


class Unlearnt(dict[str, Any]):
    """Message that is not to be learnt, but may stand before another."""

    flag: str = ""
    """What says so, e.g. ``weight: 0``."""


class Unusable(Exception):
    """Row for quarantine: ``reason`` is counted, ``detail`` is for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def listed(value: Any, column: str) -> list[Any]:
    """Returns a column's messages, given as a list, JSON text or a struct of lists.

    Raises:
        Unusable: the column holds something else.
    """
    if isinstance(value, str):
        value = decoded(value)
    if isinstance(value, dict):
        value = _zipped(value)
    if isinstance(value, str):
        raise Unusable(
            "malformed",
            f"{column}: expected a list, found str that is no JSON ({value[:20]!r}); write the data as JSON lines",
        )
    if not isinstance(value, list):
        raise Unusable("malformed", f"{column}: expected a list, found {type(value).__name__}")
    return value


def is_message(value: Any) -> bool:
    """Tells a message, even a malformed one, from other values."""
    return isinstance(value, dict) and isinstance(value.get("role") or value.get("from"), str)


def unpacked(value: Any) -> Any:
    """Parses messages stored as JSON text; returns other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        found = decoded(value)
        if isinstance(found, list) and found and all(is_message(each) and each.keys() & _SAID for each in found):
            return found
    return value


def decoded(value: Any) -> Any:
    """Parses JSON text; returns other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def python_text(value: Any, column: str) -> str | None:
    """Returns the fault of messages as Python prints them, as pandas and ``datasets`` write them to CSV; else None."""
    if not isinstance(value, str) or not _PYTHON.match(value) or not _PYTHON_ROLE.search(value):
        return None
    return (
        f"{column}: holds messages as Python's text and not as JSON ({value.strip()[:20]!r}); write the data as JSON "
        "lines, with lists of messages"
    )


def refuse_python_text(value: Any, column: str) -> None:
    """Raises Unusable for messages as Python prints them."""
    if fault := python_text(value, column):
        raise Unusable("malformed", fault)


def _zipped(value: dict[str, Any]) -> Any:
    """Turns ``{"role": [...], "content": [...]}`` into messages; returns other dicts unchanged."""
    lists = {key: each for key, each in value.items() if each is not None}
    if not lists or not all(isinstance(each, list) for each in lists.values()):
        return value
    if len({len(each) for each in lists.values()}) != 1:
        return value
    return [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]


def parse_messages(values: list[Any], start: int = 0) -> list[Message]:
    """Gives messages the templates' roles and keys; raises Unusable for a malformed message.

    Args:
        start: index of the first message.
    """
    return [_parse(index, value) for index, value in enumerate(values, start)]


def spoken(role: str, text: Any, index: int, column: str) -> Message:
    """Returns the message that a column holds; raises Unusable if ``text`` is neither text nor text parts."""
    if not isinstance(text, str | list):
        raise Unusable("malformed", f"{column}: must be text, found {type(text).__name__}")
    text = _text(index, text)
    _check_unicode(index, text)
    return {"role": role, "content": text}


def _parse(index: int, value: Any) -> Message:
    if isinstance(value, dict) and len(value) == 2:  # most messages
        role, text = value.get("role"), value.get("content")
        if role in _PLAIN and isinstance(text, str):
            _check_unicode(index, text)
            return {"role": role, "content": text}
        role, text = value.get("from"), value.get("value")
        if isinstance(role, str) and role in _SHARED and isinstance(text, str):
            _check_unicode(index, text)
            return {"role": _SHARED[role], "content": text}
    if isinstance(value, str):
        raise Unusable("malformed", f"message {index}: is text without a speaker; write a role and a content")
    if not isinstance(value, dict):
        raise Unusable("malformed", f"message {index}: needs a role of {_ROLES}, found {type(value).__name__}")
    given = value.get("role") or value.get("from")
    role, other = (
        ROLES.get(each.strip().lower()) if isinstance(each, str) else None for each in (given, value.get("from"))
    )
    if value.get("from") and role != other:
        raise Unusable("malformed", f"message {index}: has role and from, which differ")
    if role is None:
        found = f", found {given!r}" if given else f"; its keys are {', '.join(map(str, value)) or 'none'}"
        raise Unusable("malformed", f"message {index}: needs a role of {_ROLES}{found}")
    message = {key: value[key] for key in KEPT if value.get(key) is not None and _is_read(key, value[key])}
    thought, content = _thought_and_content(index, value)
    if thought:
        message["reasoning_content"] = thought
    if given == CALL or value.get(CALL):
        message["tool_calls"] = _calls(index, content if given == CALL else value[CALL])
        content = "" if given == CALL else content
    if "tool_calls" in message:
        message["tool_calls"] = decoded(message["tool_calls"])
        if not isinstance(message["tool_calls"], list):
            raise Unusable("malformed", f"message {index}: tool_calls must be a list")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if content is None and message.get("tool_calls"):
        content = ""
    if content is None and not value.keys() & {"content", "value"}:
        raise Unusable(
            "malformed", f"message {index}: content must be text, found NoneType; its keys are {', '.join(value)}"
        )
    text = _text(index, content)
    _check_unicode(index, text)
    refuse_surrogates(message, f"message {index}")
    parsed = {"role": role, "content": text} | message
    for key in _LEARNT:
        if not value.get(key, True) and _is_read(key, value[key]):
            parsed = Unlearnt(parsed)
            parsed.flag = f"{key}: {json.dumps(value[key])}"
            return parsed
    return parsed


def _thought_and_content(index: int, value: dict[str, Any]) -> tuple[str, Any]:
    thoughts = {key: value[key] for key in REASONING if key in value and _is_read(key, value[key])}
    thought, content = _either(index, thoughts, *REASONING), _either(index, value, "content", "value")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in REASONING]
        found = "".join(str(part.get(part["type"]) or part.get("text") or "") for part in parts)
        content = [part for part in content if part not in parts]
        thought = _either(index, {REASONING[0]: thought, "a part": found}, REASONING[0], "a part")
    thought = thought or value.get("reasoning_details") or ""
    if not isinstance(thought, str):
        raise Unusable(
            "malformed",
            f"message {index}: its thought must be text, found {type(thought).__name__}; write it as reasoning_content",
        )
    return thought, content


def unread_keys(value: list[Any] | dict[str, Any]) -> set[str]:
    """Returns the keys of a column's messages that are not read."""
    found = _zipped(value) if isinstance(value, dict) else value
    messages = found if isinstance(found, list) else [found]
    return {
        key
        for message in messages
        if isinstance(message, dict) and len(message) > 2
        for key, each in message.items()
        if each is not None and not _is_read(key, each)
    }


def _is_read(key: str, value: Any) -> bool:
    """Tells whether a key is read: a thought unless boolean, a flag only if boolean (``weight``: also 0 or 1)."""
    if key in REASONING:
        return not isinstance(value, bool)
    if key in _LEARNT:
        return isinstance(value, bool) or (key == "weight" and value in (0, 1))
    return key in _READ


def _either(index: int, value: dict[str, Any], *names: str) -> Any:
    found = {name: value[name] for name in names if value.get(name) not in (None, "")}
    first, *others = found.values() or [next((value[name] for name in names if value.get(name) is not None), None)]
    if any(other != first for other in others):
        raise Unusable("malformed", f"message {index}: has {' and '.join(found)}, which differ")
    return first


def _calls(index: int, value: Any) -> list[dict[str, Any]]:
    """Returns the calls of a message: one, or a list of those made at once."""
    found = decoded(value)
    functions = found if isinstance(found, list) and found else [found]
    for function in functions:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable(
                "malformed", f"message {index}: {CALL} must be JSON with name and arguments, or a list of it"
            )
    return [{"type": "function", "function": function} for function in functions]


def _text(index: int, content: Any) -> str:
    """Joins text parts without a blank, as chat templates do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable("malformed", f"message {index}: content must be text, found {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unusable("malformed", f"message {index}: content must be text, found list with a part {kind!r}")
    return "".join(part["text"] for part in content)


def refuse_surrogates(value: Any, what: str) -> None:
    """Raises Unusable if a JSON value holds a lone surrogate, which UTF-8 cannot encode."""
    if value is None or (isinstance(value, str) and value.isascii()):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Unusable("malformed", f"{what} is not valid Unicode (a lone surrogate)") from None


def _check_unicode(index: int, text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise Unusable("malformed", f"message {index}: content is not valid Unicode (a lone surrogate)") from None
