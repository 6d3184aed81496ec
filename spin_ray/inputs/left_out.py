"""Parts of a conversation that a chat template leaves out, such as the text beside a tool call, or tools.

What is left out depends on the roles and keys of all messages, hardly ever on their texts. So each sequence of these is
rendered once, with words that stand nowhere else in place of texts, names of tools and arguments.
"""

import json
from collections.abc import Callable
from typing import Any

from spin_ray.inputs.messages import Conversation, Tools

Ask = Callable[[Conversation, bool, Tools], str | None]
"""Function of messages, ``add_generation_prompt`` and tools; returns the rendered text, or None for a refusal."""

TOOLS_LOST = "it has tools, which its chat template does not write"
_MOST = 4096


class LeftOut:
    """Parts that one template leaves out, by the sequences of roles and keys seen so far."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: dict[tuple[Any, ...], str | None] = {}

    def find(self, messages: Conversation, tools: Tools, add_generation_prompt: bool) -> str | None:
        """Says what the template would leave out; None if that is nothing, or if it refuses such messages.

        Thoughts do not count: templates take those of earlier turns out on purpose.
        """
        roles = [
            (message["role"], not message["content"]) if len(message) == 2 else _form(message) for message in messages
        ]
        sequence = (len(tools or ()), add_generation_prompt, *roles)
        if sequence not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            words = _Words()
            named = [words.instead_of_name(tool) for tool in tools] if tools else None
            text = self._ask([words.instead_of(message) for message in messages], add_generation_prompt, named)
            if text is None:  # for a value of this row perhaps, such as the form of an id
                return None
            self._known[sequence] = words.first_missing(text)
        return self._known[sequence]


class _Words:
    """Words in lower case, each instead of one part of a conversation."""

    def __init__(self) -> None:
        self._messages = self._made = 0
        self._parts: dict[str, str] = {}

    def first_missing(self, text: str) -> str | None:
        lower = text.lower()  # a template may write capitals
        return next((part for word, part in self._parts.items() if word not in lower), None)

    def instead_of(self, message: dict[str, Any]) -> dict[str, Any]:
        where = f"message {self._messages} ({message['role']}): its chat template leaves out"
        self._messages += 1
        words = dict(message)
        if message["content"]:
            words["content"] = self._word_for(f"{where} the text")
        if message.get("reasoning_content"):
            words["reasoning_content"] = self._word()
        if calls := message.get("tool_calls"):
            words["tool_calls"] = [
                self._call(call, f"call {number} of tool_calls", where) for number, call in enumerate(calls, 1)
            ]
        return words

    def instead_of_name(self, tool: Any) -> Any:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return tool
        named = function | {"name": self._word_for(TOOLS_LOST)}
        return tool | {"function": named} if "function" in tool else named

    def _call(self, call: dict[str, Any], what: str, where: str) -> dict[str, Any]:
        function = call.get("function", call)
        words = function | {"name": self._word_for(f"{where} {what}")}
        if kind := _kind_of_arguments(call):
            arguments = {"x": self._word_for(f"{where} the arguments of {what}")}
            words["arguments"] = arguments if kind is dict else json.dumps(arguments)
        return call | {"function": words} if "function" in call else words

    def _word_for(self, part: str) -> str:
        word = self._word()
        self._parts[word] = part
        return word

    def _word(self) -> str:
        self._made += 1
        return f"zq{self._made:08d}qz".translate(_LETTERS)


_LETTERS = str.maketrans("0123456789", "abcdefghij")


def _form(message: dict[str, Any]) -> tuple[Any, ...]:
    calls = tuple([("function" in call, _kind_of_arguments(call)) for call in message.get("tool_calls", ())])
    return message["role"], not message["content"], calls, *(bool(message.get(key)) for key in _KEYS)


_KEYS = ("reasoning_content", "tool_call_id", "name")


def _kind_of_arguments(call: dict[str, Any]) -> type | None:
    arguments = call.get("function", call).get("arguments")
    if isinstance(arguments, str):
        return str if arguments.strip() not in ("", "{}") else None
    return dict if arguments and isinstance(arguments, dict) else None
