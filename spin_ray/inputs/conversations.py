"""A row of data -> the conversations in it, checked."""

import math
import re
from typing import Any

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.forms import FORMS, Exchange, form_of, mapped, no_form
from spin_ray.inputs.messages import Conversation, Message, Unusable, decoded, refuse_surrogates

__all__ = ["Conversation", "Message", "Unusable", "answer_of", "conversations_of", "question_of", "rejected_of"]


def conversations_of(content: dict[str, Any] | None, data: DataConfig) -> list[Conversation]:
    """Returns the conversations that end with a response, by ``data.turns``.

    Raises:
        Unusable: there are none.
    """
    return _ending_with_response(_exchange_of(content, data).messages, data)


def rejected_of(content: dict[str, Any] | None, data: DataConfig) -> Conversation | None:
    """Returns the conversation that ends with the worse response; None without one.

    Raises:
        Unusable: the worse response is malformed, or answers another prompt than the better one.
    """
    row = mapped(content or {}, data)
    if row.get("rejected") is None and row.get("generated") is None:  # most rows; spares reading them twice
        return None
    exchange = _exchange_of(content, data)
    if exchange.rejected is None:
        return None
    rejected = _ending_with_response(exchange.rejected, data)
    if rejected[-1][:-1] != _ending_with_response(exchange.messages, data)[-1][:-1]:
        raise Unusable("malformed", "chosen and rejected do not answer the same prompt")
    return rejected[-1]


def question_of(content: dict[str, Any] | None, data: DataConfig) -> Conversation:
    """Returns a question with an empty response; raises Unusable if the row has none."""
    if content is None:
        raise Unusable("malformed", "not a JSON object")
    row = mapped(content, data)
    for form in FORMS:
        if data.form not in (None, form.name):
            continue
        if form.asks is None and form.name in ("messages", "sharegpt") and form.matches(row):
            messages = form.read(row).messages
            messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
            break
        if form.asks is not None and row.get(form.asks) is not None:
            messages = form.read(row | {form.response: ""}).messages[:-1]
            break
    else:
        raise Unusable("malformed", "needs messages, or prompt")
    return _checked([*messages, {"role": "assistant", "content": ""}], row, data)


def tools_of(content: dict[str, Any] | None, data: DataConfig) -> list[Any] | None:
    """Returns the tools that the prompt offers; None without any.

    Raises:
        Unusable: ``tools`` is neither a list nor JSON text of one, or is not valid Unicode.
    """
    return _tools_in(mapped(content or {}, data))


def _tools_in(row: dict[str, Any]) -> list[Any] | None:
    tools = decoded(row.get("tools"))
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list):
        raise Unusable("malformed", f"tools: expected a list, found {type(tools).__name__}")
    refuse_surrogates(tools, "tools")
    return tools


_NUMBER = re.compile(r"\s*[-+]?\d{1,3}(,\d{3})+(\.\d*)?\s*")


def answer_of(value: Any) -> float | None:
    """Returns ``value`` as a finite number, or None. Text may be ``1,234``, or end with ``#### 12``."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = value.rpartition("####")[2]
        value = value.replace(",", "") if _NUMBER.fullmatch(value) else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _exchange_of(content: dict[str, Any] | None, data: DataConfig) -> Exchange:
    if content is None:
        raise Unusable("malformed", "not a JSON object")
    row = mapped(content, data)
    if (rejected := row.get("rejected")) is not None and row.get("chosen") is None:
        raise Unusable("malformed", "has rejected, but no chosen")
    form = form_of(row, data)
    if rejected is not None and "rejected" not in (form.may if form else ()) and data.form is None:
        raise Unusable("malformed", "chosen is text, and there is no prompt that it answers")
    if form is None:
        raise Unusable("malformed", no_form(row, data))
    messages, rejected = form.read(row)
    return Exchange(_checked(messages, row, data), _checked(rejected, row, data) if rejected is not None else None)


def _ending_with_response(messages: list[Message], data: DataConfig) -> list[Conversation]:
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {"first": ends[:1], "last": ends[-1:], "all": ends}[data.turns]
    for end in wanted:
        if not messages[end]["content"].strip() and not messages[end].get("tool_calls"):
            raise Unusable("empty", f"message {end} (assistant) has no text")
    return [messages[: end + 1] for end in wanted]


def _checked(messages: list[Message], row: dict[str, Any], data: DataConfig) -> list[Message]:
    """Returns the messages with the recipe's system message; raises Unusable without a prompt and a response."""
    _tools_in(row)  # raises Unusable for what is no list
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise Unusable("empty", "no assistant message")
    if first == 0:
        raise Unusable("empty", "starts with the assistant: there is no prompt")
    if all(message["role"] in ("system", "developer") for message in messages[:first]):
        raise Unusable("empty", f"message {first} (assistant) follows no message of a user")
    if data.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": data.system}, *messages]
    return messages
