"""What a chat template adds to a row and takes from it."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """Traits of a chat template that change what a row says."""

    before: str
    """Text before the message of a lone user."""
    after: str
    """Text between a user's message and the answer."""
    default_system: str
    """System prompt that rows without one get; empty without any."""
    writes_date: bool
    strips: tuple[str, ...]
    """Parts of a response that are lost."""


def template_facts(tokenizer: Any) -> TemplateFacts:
    """Reads the traits from plain exchanges."""
    user, answer = {"role": "user", "content": "USER-PROBE"}, "ANSWER-PROBE"
    prompt = _applied(tokenizer, [user], ask=True)
    before, _, after = prompt.partition("USER-PROBE")

    def keeps(text: str) -> bool:
        return text in _applied(tokenizer, [user, {"role": "assistant", "content": text}], ask=False)

    parts = {
        "blanks before it": f"  {answer}",
        "blanks after it": f"{answer}  ",
        "line breaks at its end": f"{answer}\n\n",
        "a thought in <think>": f"<think>THOUGHT-PROBE</think>{answer}",
    }
    return TemplateFacts(
        before=before,
        after=after,
        default_system=_default_system(tokenizer, before),
        writes_date="strftime_now" in str(tokenizer.chat_template) or "date_string" in str(tokenizer.chat_template),
        strips=tuple(name for name, text in parts.items() if not keeps(text)),
    )


def _default_system(tokenizer: Any, before: str) -> str:
    """Returns the words before a user's message that a system message of the row's own replaces."""
    system = {"role": "system", "content": "SYSTEM-PROBE"}
    try:
        given = _applied(tokenizer, [system, {"role": "user", "content": "USER-PROBE"}], ask=True)
    except (TemplateError, ValueError, TypeError, KeyError):  # the template refuses system messages
        return ""
    head, mark, rest = given.partition("USER-PROBE")[0].partition("SYSTEM-PROBE")
    replaced = before.removeprefix(head)
    if not mark or not rest or not before.startswith(head) or not replaced.endswith(rest):
        return ""
    return replaced.removesuffix(rest)


def _applied(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
