"""Checked conversations of a row."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.forms import (
    FINISH_REASONS,
    FORMS,
    Form,
    form_of,
    is_wanted,
    mapped,
    no_form,
    why_incomplete,
    why_unasked,
)
from spin_ray.inputs.messages import Conversation, Message, Unlearnt, Unusable, decoded, refuse_surrogates

__all__ = ["Conversation", "Message", "Unusable", "conversations_of", "question_of", "read_row"]


class Found(NamedTuple):
    """Content of a usable row."""

    ending_with_real: list[Conversation]
    """Conversations that end with a human response, by ``data.turns``."""
    rejected: Conversation | None = None
    """Last conversation with the rejected response."""
    tools: list[Any] | None = None
    row: Mapping[str, Any] = MappingProxyType({})
    """Columns by the forms' names."""
    form: Form | None = None
    """Form of the row; None for a question."""
    goes_on: bool = False
    """True if messages that nobody answers follow the last response that is read."""
    cut: frozenset[str] = frozenset()
    """Columns of ``FINISH_REASONS`` whose response reached ``max_tokens`` before its end."""

    @property
    def conversation_id(self) -> str | None:
        """Name of the conversation that the row is a part of; None if the data names none."""
        name = self.row.get("conversation_id")
        if isinstance(name, float) and name.is_integer():  # whole numbers beside empty cells, as pandas writes them
            name = int(name)
        return str(name) if isinstance(name, str | int) and not isinstance(name, bool) and name != "" else None

    @property
    def all(self) -> list[Conversation]:
        return [*self.ending_with_real, *([self.rejected] if self.rejected else [])]

    @property
    def has_end(self) -> list[bool]:
        """Tells of each conversation of ``all`` whether its response has an end of turn."""
        real = [*[True] * (len(self.ending_with_real) - 1), "chosen" not in self.cut]
        return [*real, *(["rejected" not in self.cut] if self.rejected else [])]


def read_row(content: dict[str, Any] | None, data: DataConfig, unread: Iterable[str] = ()) -> Found:
    """Reads a row with a response.

    Args:
        unread: names of the row's columns that are not in ``content``.

    Raises:
        Unusable: there is no response, or chosen and rejected answer different prompts.
    """
    row, form = _form_of(content, data, unread)
    messages, worse = form.read(row)
    checked = _checked(messages, data)
    real = _ending_with_response(checked, data)
    rejected = None
    if worse is not None:
        rejected = _ending_with_response(_checked(worse, data), data)[-1]
        if rejected[:-1] != real[-1][:-1]:
            raise Unusable("malformed", "chosen and rejected do not answer the same prompt")
    goes_on = data.turns != "first" and checked[-1]["role"] != "assistant"
    cut = _cut_in(row, form) if len(real[-1]) == len(checked) else frozenset[str]()
    return Found(real, rejected, _tools_in(row), row, form, goes_on, cut)


def _cut_in(row: Mapping[str, Any], form: Form) -> frozenset[str]:
    """Returns the columns whose last answer was cut."""
    return frozenset(
        column for column, name in FINISH_REASONS.items() if name in form.may and row.get(name) == "length"
    )


def conversations_of(content: dict[str, Any] | None, data: DataConfig) -> list[Conversation]:
    """Returns the conversations that end with a response; raises Unusable if there are none."""
    return read_row(content, data).ending_with_real


def question_of(content: dict[str, Any] | None, data: DataConfig) -> Found:
    """Reads a question and adds an empty response; raises Unusable if there is no question."""
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
    return Found([_checked([*messages, {"role": "assistant", "content": ""}], data)], None, _tools_in(row), row)


def _tools_in(row: dict[str, Any]) -> list[Any] | None:
    tools = decoded(row.get("tools"))
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list):
        raise Unusable("malformed", f"tools: expected a list, found {type(tools).__name__}")
    refuse_surrogates(tools, "tools")
    return tools


def _form_of(content: dict[str, Any] | None, data: DataConfig, unread: Iterable[str]) -> tuple[dict[str, Any], Form]:
    if content is None:
        raise Unusable("malformed", "not a JSON object")
    row = mapped(content, data)
    if (rejected := row.get("rejected")) is not None and row.get("chosen") is None:
        raise Unusable("malformed", "has rejected, but no chosen")
    form = form_of(row, data)
    if form is None:
        raise Unusable("malformed", no_form(row, data, unread))
    if rejected is not None and "rejected" not in form.may and data.form is None:
        raise Unusable("malformed", why_unasked(row, unread))
    if incomplete := why_incomplete(row, form, data):
        raise Unusable("malformed", incomplete)
    if is_wanted(row.get("label")) is False:
        raise Unusable("rejected", "label is false: people did not want this response")
    return row, form


def _ending_with_response(messages: list[Message], data: DataConfig) -> list[Conversation]:
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if data.turns == "all" and any(isinstance(message, Unlearnt) for message in messages):
        ends = [end for end in ends if not isinstance(messages[end], Unlearnt)] or ends
    wanted = ends[-1:] if data.turns == "last" else ends[:1] if data.turns == "first" else ends
    for index, message in enumerate(messages[: wanted[-1] + 1]):
        if message["content"].strip():
            continue
        if message["role"] == "user" or (index in wanted and not message.get("tool_calls")):
            raise Unusable("empty", f"message {index} ({message['role']}) has no text")
    for end in wanted:
        if isinstance(unlearnt := messages[end], Unlearnt):
            raise Unusable("rejected", f"message {end} (assistant) is not to be learnt ({unlearnt.flag})")
    return [messages[: end + 1] for end in wanted]


def _checked(messages: list[Message], data: DataConfig) -> list[Message]:
    asked = False
    for first, message in enumerate(messages):  # noqa: B007
        if message["role"] == "assistant":
            break
        asked = asked or message["role"] not in ("system", "developer")
    else:
        raise Unusable("empty", "no assistant message")
    if first == 0:
        raise Unusable("empty", "starts with the assistant: there is no prompt")
    if not asked:
        raise Unusable("empty", f"message {first} (assistant) follows no message of a user")
    if data.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": data.system}, *messages]
    return messages
