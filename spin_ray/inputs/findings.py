"""Traits of a chat template, and findings about template and rows."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from spin_ray.inputs.chat_template import ChatTemplate, RenderError
from spin_ray.inputs.conversations import Conversation, Message
from spin_ray.inputs.messages import Tools
from spin_ray.inputs.rendering import ChatRenderer
from spin_ray.inputs.thoughts import SWITCHES, opened_by, thought_of

_PROBE = "spin-ray-probe"
_USER = {"role": "user", "content": _PROBE}
_BLANKS = {
    "blanks before it": f"  {_PROBE}",
    "blanks after it": f"{_PROBE}  ",
    "line breaks at its end": f"{_PROBE}\n\n",
}
_TRANSCRIPT = re.compile(
    r"(?:^\s*Human:.*\nAssistant:|\bUSER:.*\bASSISTANT:|\bGPT4 Correct Assistant:|### (?:Response|Assistant):?"
    r"|\[/INST\]|\[\|AI\|\]|<\|(?:im_start|start)\|>assistant|<\|start_of_role\|>assistant<\|end_of_role\|>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|<\|assistant\|>|<\uff5cAssistant\uff5c>"
    r"|<\|CHATBOT_TOKEN\|>)\s*(?:<think>\s*)?$",
    re.DOTALL,
)
"""A prompt that is rendered already. ``Assistant:`` alone proves nothing: few-shot prompts end with it, too."""
_FEWEST_TRANSCRIPTS = 3
_THOUGHT = f"<think>\n{_PROBE}\n</think>"


class Finding(NamedTuple):
    sentence: str
    severity: Literal["note", "warning", "error"]
    """Level; an ``error`` stops a run before generation."""


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """Traits of a chat template that change what a row says."""

    before: str
    """Text before the first user message."""
    after: str
    """Text between user message and answer."""
    system: Literal["written", "refused", "left out"]
    default_system: str
    """System prompt for rows without one; may be empty."""
    alternates: bool
    """True if user and assistant must alternate."""
    writes_date: bool
    strips: tuple[str, ...]
    """Lost parts of a response."""
    cuts_thoughts: bool
    """True if thoughts of earlier turns are lost."""


def template_facts(template: ChatTemplate) -> TemplateFacts:
    """Finds the traits by rendering short conversations."""

    def loses(part: str, messages: Conversation, *, ask: bool = False) -> bool:
        text = template.ask(messages, ask)
        return text is not None and part not in text

    before, _, after = (template.ask([_USER], True) or "").partition(_PROBE)
    given = template.ask([{"role": "system", "content": "SYSTEM"}, _USER], True)
    parts = _BLANKS | {"a thought in <think>": f"{_THOUGHT}{_PROBE}"}
    answer = {"role": "assistant", "content": f"{_THOUGHT}\n\nx"}
    question = {"role": "user", "content": "?"}
    return TemplateFacts(
        before=before,
        after=after,
        system="refused" if given is None else "written" if "SYSTEM" in given else "left out",
        default_system=_default_system(before, given or ""),
        alternates=template.ask([_USER, _USER], True) is None,
        writes_date="strftime_now" in template.source,
        strips=tuple(
            name for name, text in parts.items() if loses(text, [_USER, {"role": "assistant", "content": text}])
        ),
        cuts_thoughts="</think>" in template.source and loses(_PROBE, [question, answer, question], ask=True),
    )


def _default_system(before: str, given: str) -> str:
    head, mark, rest = given.partition(_PROBE)[0].partition("SYSTEM")
    replaced = before.removeprefix(head)
    if not mark or not rest or not before.startswith(head) or not replaced.endswith(rest):
        return ""
    return replaced.removesuffix(rest)


def find_in_template(template: ChatTemplate) -> list[Finding]:
    """Returns what the template does to conversations."""
    return list(_sentences(template_facts(template), template))


def _sentences(facts: TemplateFacts, template: ChatTemplate) -> Iterator[Finding]:
    if facts.system == "refused":
        yield Finding("the chat template refuses system messages; rows with one go to quarantine", "warning")
    if facts.system == "left out":
        yield Finding("the chat template leaves system messages out; rows with one go to quarantine", "warning")
    if facts.default_system:
        yield Finding(
            f"the chat template adds a system message of {len(facts.default_system)} characters to conversations "
            "without one; data.system replaces it",
            "note",
        )
    if facts.alternates:
        yield Finding(
            "the chat template wants user and assistant in turn; rows in another order go to quarantine", "note"
        )
    if facts.writes_date:
        yield Finding(
            f"the chat template may write the date; this run's is {template.variables.date:%d %b %Y} to its end", "note"
        )
    if _BLANKS.keys() & set(facts.strips):
        yield Finding("the chat template trims responses: blanks around them are not learnt", "note")
    if facts.cuts_thoughts:
        yield Finding("the chat template takes thoughts out of earlier turns", "note")


def find_in_rows(renderer: ChatRenderer, rows: Sequence[tuple[Conversation, Tools]], source: str) -> list[Finding]:
    """Returns faults that at least half of the rows share."""
    written = [renderer.texts(messages, tools) for messages, tools in rows]
    refused = [text for text in written if isinstance(text, RenderError)]
    if rows and len(refused) == len(rows):
        sentence = f"{source}: the chat template can write none of the first {len(rows)} rows: {refused[0]}"
        return [Finding(sentence + _switch_for(renderer, rows), "error")]
    findings = [
        _find_thoughts(renderer, [text for text in written if not isinstance(text, RenderError)], source),
        _find_transcripts(renderer, [messages[:-1] for messages, _ in rows], source),
        _find_tools_twice(rows, source),
    ]
    return [finding for finding in findings if finding]


def _find_transcripts(renderer: ChatRenderer, prompts: Sequence[Conversation], source: str) -> Finding | None:
    marks = renderer.template.marks_between_turns()
    texts = [said[-1]["content"] for said in prompts]
    rendered = [text for text in texts if _TRANSCRIPT.search(text) or any(mark in text for mark in marks)]
    if len(rendered) < max(_FEWEST_TRANSCRIPTS, len(prompts) / 2):
        return None
    return Finding(
        f"{source}: {len(rendered)} of the first {len(prompts)} prompts look written for a model already (first: "
        f"{rendered[0][:40]!r}…), and the chat template writes its own marks around them; give the bare text, or "
        "messages",
        "warning",
    )


def _find_tools_twice(rows: Sequence[tuple[Conversation, Tools]], source: str) -> Finding | None:
    """Returns a warning for rows whose system message has the tools that the template writes, as Hermes' have."""
    offered = [(messages, tools) for messages, tools in rows if tools]
    twice = [messages for messages, tools in offered if _lists_tools(messages[0], tools or [])]
    if not twice or len(twice) < len(offered) / 2:
        return None
    return Finding(
        f"{source}: {len(twice)} of the first {len(offered)} rows with tools list them in the system message, too, and "
        "the chat template writes them again; take them out of the message, or drop the column tools",
        "warning",
    )


def _lists_tools(message: Message, tools: list[dict[str, Any]]) -> bool:
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    names = [str(each.get("name")) for each in functions if isinstance(each, dict)]
    return message["role"] in ("system", "developer") and all(
        re.search(rf"""["']name["']\s*:\s*["']{re.escape(name)}["']""", message["content"]) for name in names
    )


def _find_thoughts(renderer: ChatRenderer, written: list[tuple[str, str]], source: str) -> Finding | None:
    """Returns an error if the prompt asks for thoughts and no row has one: SPIN would unlearn thinking."""
    thoughts = [thought_of(prompt, response) for prompt, response in written]
    opened = any(opened_by(prompt) for prompt, _ in written)
    if not written or any(thoughts) or (not opened and None in thoughts):
        return None
    where = "its prompt opens a thought" if opened else "it writes an empty thought before each response"
    return Finding(
        f"{source}: none of the first {len(written)} responses has a thought, but the chat template is that of a model "
        f"that thinks ({where}): all that could be learnt is not to think. {_cure_of_thoughts(renderer.template)}",
        "error",
    )


def _cure_of_thoughts(template: ChatTemplate) -> str:
    switch = next(
        (name for name in SWITCHES if template.names(name) and template.variables.kwargs.get(name) is not False), None
    )
    if switch:
        return f"Set model.chat_template_kwargs: {{{switch}: false}}, or add the thoughts to the data"
    return "Set model.chat_template to a file that opens no thought, or add the thoughts to the data"


def _switch_for(renderer: ChatRenderer, rows: Sequence[tuple[Conversation, Tools]]) -> str:
    template, (messages, tools) = renderer.template, rows[0]
    for name in SWITCHES:
        for value in (False, True) if template.opening else (True, False):
            if template.names(name) and template.would_write(messages, tools, {name: value}):
                return f"; set model.chat_template_kwargs: {{{name}: {str(value).lower()}}}"
    return ""
