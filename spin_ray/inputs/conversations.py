"""A row of data -> the conversations in it, checked."""

import math
from typing import Any

from spin_ray.config.sections import DataConfig

Message = dict[str, str]
Conversation = list[Message]


class Unusable(Exception):
    """A row for quarantine: a ``reason`` to count and a ``detail`` to read."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def conversations_of(content: dict[str, Any] | None, data: DataConfig) -> list[Conversation]:
    """Returns the conversations that end with a response, by ``data.turns``.

    A list ``chosen`` replaces ``messages``; a text ``chosen`` replaces ``response``.

    Raises:
        Unusable: there are none.
    """
    if content is None:
        raise Unusable("malformed", "not a JSON object")
    messages = _messages_of(content, data)
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {"first": ends[:1], "last": ends[-1:], "all": ends}[data.turns]
    for end in wanted:
        if not messages[end]["content"].strip():
            raise Unusable("empty", f"message {end} (assistant) has no text")
    return [messages[: end + 1] for end in wanted]


def rejected_of(content: dict[str, Any] | None, data: DataConfig) -> Conversation | None:
    """Returns the conversation that ends with ``rejected``; None without one.

    Raises:
        Unusable: ``rejected`` is malformed, or answers another prompt than ``chosen``.
    """
    if content is None or content.get("rejected") is None:
        return None
    if content.get("chosen") is None:
        raise Unusable("malformed", "has rejected, but no chosen")
    if isinstance(content["chosen"], str) and content.get("prompt") is None:
        raise Unusable("malformed", "chosen is text, and there is no prompt that it answers")
    rejected = conversations_of(content | {"chosen": content["rejected"], "rejected": None}, data)
    if rejected[-1][:-1] != conversations_of(content, data)[-1][:-1]:
        raise Unusable("malformed", "chosen and rejected do not answer the same prompt")
    return rejected[-1]


def question_of(content: dict[str, Any] | None, data: DataConfig) -> Conversation:
    """Returns a question with an empty response; raises Unusable if the row has none."""
    if content is None:
        raise Unusable("malformed", "not a JSON object")
    messages = content.get("messages")
    if messages is None:
        if "prompt" not in content:
            raise Unusable("malformed", "needs messages, or prompt")
        messages = [{"role": "user", "content": content["prompt"]}]
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        messages = [*messages, {"role": "assistant", "content": ""}]
    return _messages_of({"messages": messages}, data)


def answer_of(value: Any) -> float | None:
    """Returns ``value`` as a finite number, or None."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _messages_of(content: dict[str, Any], data: DataConfig) -> list[Message]:
    chosen = content.get("chosen")
    messages = chosen if isinstance(chosen, list) else content.get("messages")
    if messages is None or (isinstance(chosen, str) and content.get("prompt") is not None):
        if "prompt" not in content or ("response" not in content and chosen is None):
            raise Unusable("malformed", "needs messages, or prompt and response")
        response = content["response"] if chosen is None else chosen
        messages = [{"role": "user", "content": content["prompt"]}, {"role": "assistant", "content": response}]
    if not isinstance(messages, list):
        raise Unusable("malformed", f"messages: expected a list, found {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise Unusable("malformed", f"message {index}: needs a role of system, user or assistant")
        text = message.get("content")
        if not isinstance(text, str):
            raise Unusable("malformed", f"message {index}: content must be text, found {type(text).__name__}")
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise Unusable("malformed", f"message {index}: content is not valid Unicode (a lone surrogate)") from None
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("empty", "no assistant message")
    if messages[0]["role"] == "assistant":
        raise Unusable("empty", "starts with the assistant: there is no prompt")
    if data.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data.system})
    return messages
