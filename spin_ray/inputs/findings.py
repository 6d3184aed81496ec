"""Findings about a chat template and the rows that it renders, one sentence each."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from spin_ray.inputs.chat_template import ChatTemplate, RenderError, Tools
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.rendering import ChatRenderer
from spin_ray.inputs.thoughts import SWITCHES, opened_by, thought_of

_USER = {"role": "user", "content": "?"}
_PROBE = "spin-ray-probe"


class Finding(NamedTuple):
    sentence: str
    severity: Literal["note", "warning", "error"]
    """An ``error`` stops a run before anything is generated."""


def find_in_template(template: ChatTemplate) -> list[Finding]:
    """Returns what the template does to conversations, found by a few plain ones."""
    found = [
        _find_about_system(template),
        _find_alternation(template),
        _find_date(template),
        _find_trimming(template),
        _find_cut_thoughts(template),
    ]
    return [finding for finding in found if finding]


def find_in_rows(renderer: ChatRenderer, rows: Sequence[tuple[Conversation, Tools]], source: str) -> list[Finding]:
    """Returns what keeps the model from learning from all of ``rows``."""
    written = [renderer.texts(messages, tools) for messages, tools in rows]
    refused = [text for text in written if isinstance(text, RenderError)]
    if rows and len(refused) == len(rows):
        sentence = f"{source}: the chat template can write none of the first {len(rows)} rows: {refused[0]}"
        return [Finding(sentence + _switch_for(renderer, rows), "error")]
    finding = _find_thoughts(renderer, [text for text in written if not isinstance(text, RenderError)], source)
    return [finding] if finding else []


def _find_about_system(template: ChatTemplate) -> Finding | None:
    system = {"role": "system", "content": _PROBE}
    plain, given = template.prompt, template.ask([system, _USER], True)
    if given is None:
        return Finding("the chat template refuses system messages; rows with one go to quarantine", "warning")
    if _PROBE not in given:
        return Finding("the chat template leaves system messages out; rows with one go to quarantine", "warning")
    empty = template.ask([system | {"content": ""}, _USER], True)
    if empty is not None and len(empty) < len(plain) and "system" in plain:
        added = len(plain) - len(empty)
        return Finding(
            f"the chat template adds a system message of {added} characters to conversations without one; "
            "data.system replaces it",
            "note",
        )
    return None


def _find_alternation(template: ChatTemplate) -> Finding | None:
    if template.ask([_USER, _USER], True) is None:
        return Finding(
            "the chat template wants user and assistant in turn; rows in another order go to quarantine", "note"
        )
    return None


def _find_date(template: ChatTemplate) -> Finding | None:
    if "strftime_now" not in template.source:
        return None
    return Finding(f"the chat template may write the date; this run's is {template.date:%d %b %Y} to its end", "note")


def _find_trimming(template: ChatTemplate) -> Finding | None:
    said = f"  {_PROBE}\n\n"
    whole = template.ask([_USER, {"role": "assistant", "content": said}], False)
    if whole is None or said in whole:
        return None
    return Finding("the chat template trims responses: blanks around them are not learnt", "note")


def _find_cut_thoughts(template: ChatTemplate) -> Finding | None:
    if "</think>" not in template.source:
        return None
    said = {"role": "assistant", "content": f"<think>\n{_PROBE}\n</think>\n\nx"}
    whole = template.ask([_USER, said, _USER], True)
    if whole is None or _PROBE in whole:
        return None
    return Finding("the chat template takes thoughts out of earlier turns", "note")


def _find_thoughts(renderer: ChatRenderer, written: list[tuple[str, str]], source: str) -> Finding | None:
    """Returns an error if the prompt leads to a thought that no row has: SPIN would learn nothing else."""
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
    switch = next((name for name in SWITCHES if template.names(name) and template.kwargs.get(name) is not False), None)
    if switch:
        return f"Set model.chat_template_kwargs: {{{switch}: false}}, or add the thoughts to the data"
    return "Set model.chat_template to a file that opens no thought, or add the thoughts to the data"


def _switch_for(renderer: ChatRenderer, rows: Sequence[tuple[Conversation, Tools]]) -> str:
    """Returns the switch of thoughts with which the template writes the first row, as a clause."""
    template, (messages, tools) = renderer.template, rows[0]
    for name in SWITCHES:
        for value in (True, False):
            if template.names(name) and template.would_write(messages, tools, {name: value}):
                return f"; set model.chat_template_kwargs: {{{name}: {str(value).lower()}}}"
    return ""
