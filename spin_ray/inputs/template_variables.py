"""Variables and date that a chat template reads beside the messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from string import ascii_letters
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_DATES = "strftime_now"
"""Name of the function by which templates write today's date."""
_FLAGS = ("", "-", "_", "0", "^", "#", "E", "O")
"""Flags and modifiers of glibc's strftime, between % and the letter."""


@dataclass(frozen=True)
class TemplateVariables:
    kwargs: Mapping[str, Any]
    date: datetime
    """The only date that templates write."""

    def arguments(self, tokenizer: Any, tools: Any = None, more: Mapping[str, Any] = _NOTHING) -> dict[str, Any]:
        """Returns arguments of ``apply_chat_template``; a template that writes the date is among them, with this one.

        transformers 5.24 hands templates plain data only, so a function given as a variable would be a text.

        Raises:
            ValueError: the tokenizer has no template, or several without a default.
        """
        arguments, source = {**self.kwargs, **more}, tokenizer.get_chat_template(tools=tools)
        if _DATES in source:
            arguments["chat_template"] = _macro(self.date) + source
        return arguments


@lru_cache(maxsize=8)
def _macro(date: datetime) -> str:
    """Returns a macro in place of transformers' function of the same name, whatever the clock says.

    Its last line break belongs to a block, so Jinja drops it, and the template still begins a line.
    """
    directives = [f"%{flag}{letter}" for flag in _FLAGS for letter in ascii_letters]
    written = {name: text for name in directives if (text := date.strftime(name)) != name}
    escaped = {"%%": "\0", **written, "\0": "%"}
    return (
        f"{{%- macro {_DATES}(format) -%}}{{%- set date = namespace(text=format) -%}}"
        f"{{%- for directive, text in {escaped!a}.items() -%}}"
        "{%- set date.text = date.text | replace(directive, text) -%}{%- endfor -%}{{- date.text -}}{%- endmacro %}\n"
    )
