"""A row of data -> the conversations in it, checked."""

import math
import re
from typing import Any, NamedTuple

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.forms import FORMS, form_of, mapped, no_form
from spin_ray.inputs.messages import Conversation, Message, Unusable, decoded, refuse_surrogates

__all__ = ["Conversation", "Message", "Unusable", "answer_of", "conversations_of", "question_of", "read_row"]


class Found(NamedTuple):
    """Content of a usable row."""

    ending_with_real: list[Conversation]
    """Conversations that end with a human response, by ``data.turns``."""
    rejected: Conversation | None = None
    """The last conversation, with the rejected response."""
    tools: list[Any] | None = None
    """Tools that the prompt offers."""

    @property
    def all(self) -> list[Conversation]:
        return [*self.ending_with_real, *([self.rejected] if self.rejected else [])]


def read_row(content: dict[str, Any] | None, data: DataConfig) -> Found:
    """Returns all that a row with responses has.

    Raises:
        Unusable: there is no response, or the rejected one answers another prompt than the human one.
    """
    messages, worse, tools = _exchange_of(content, data)
    real = _ending_with_response(messages, data)
    if worse is None:
        return Found(real, None, tools)
    rejected = _ending_with_response(worse, data)[-1]
    if rejected[:-1] != real[-1][:-1]:
        raise Unusable("malformed", "chosen and rejected do not answer the same prompt")
    return Found(real, rejected, tools)


def conversations_of(content: dict[str, Any] | None, data: DataConfig) -> list[Conversation]:
    """Returns the conversations that end with a response, by ``data.turns``; raises Unusable if there are none."""
    return read_row(content, data).ending_with_real


def question_of(content: dict[str, Any] | None, data: DataConfig) -> Found:
    """Returns a question with an empty response and its tools; raises Unusable if the row has none."""
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
    return Found([_checked([*messages, {"role": "assistant", "content": ""}], data)], None, _tools_in(row))


def _tools_in(row: dict[str, Any]) -> list[Any] | None:
    """Returns ``tools``, a list or JSON text of one; raises Unusable for anything else."""
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


def _exchange_of(
    content: dict[str, Any] | None, data: DataConfig
) -> tuple[list[Message], list[Message] | None, list[Any] | None]:
    """Returns the conversation, that with the worse response, and the tools."""
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
    if row.get("label") is False:
        raise Unusable("rejected", "label is false: people did not want this response")
    messages, rejected = form.read(row)
    tools = _tools_in(row)
    return _checked(messages, data), _checked(rejected, data) if rejected is not None else None, tools


def _ending_with_response(messages: list[Message], data: DataConfig) -> list[Conversation]:
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {"first": ends[:1], "last": ends[-1:], "all": ends}[data.turns]
    for end in wanted:
        if not messages[end]["content"].strip() and not messages[end].get("tool_calls"):
            raise Unusable("empty", f"message {end} (assistant) has no text")
        for index, message in enumerate(messages[:end]):
            if message["role"] == "user" and not message["content"].strip():
                raise Unusable("empty", f"message {index} (user) has no text")
    return [messages[: end + 1] for end in wanted]


def _checked(messages: list[Message], data: DataConfig) -> list[Message]:
    """Returns the messages with the recipe's system message; raises Unusable without a prompt and a response."""
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
