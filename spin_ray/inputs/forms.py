"""Forms of rows: which columns hold prompt and response.

A new form is a function and an entry of ``FORMS``, the table of docs/data.md.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from spin_ray.config.sections import DataConfig
from spin_ray.errors import ConfigError, DataError
from spin_ray.inputs.exchanges import (
    Columns,
    Exchange,
    answered,
    both,
    is_conversation,
    read_alpaca,
    read_alpaca_preferred,
    read_messages,
    read_sharegpt,
    read_sharegpt_preferred,
    unpacked_responses,
)  # fmt: skip
from spin_ray.inputs.files import SourceRow
from spin_ray.inputs.messages import decoded, is_message, python_text, unpacked, unread_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    name: str
    needs: tuple[str, ...]
    """Required columns."""
    may: tuple[str, ...] = ()
    """Optional columns."""
    read: Callable[[Columns], Exchange]
    """Function from a row to messages; raises Unusable."""
    fits: Callable[[Columns], bool] = lambda row: True
    """Test that tells forms with equal columns apart."""
    asks: str | None = None
    """Column of the question; without a response, the row is a question."""
    response: str = ""
    known_from: str
    example: Columns

    def matches(self, row: Columns) -> bool:
        for column in self.needs:
            if row.get(column) is None:
                return False
        return self.fits(row)


_HI = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
_BAD = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}]

FINISH_REASONS = {"chosen": "chosen_finish_reason", "rejected": "rejected_finish_reason"}
"""Columns of exported votes. ``length`` says that an answer was cut: it gets no end of turn."""

FORMS: tuple[Form, ...] = (
    Form(
        name="sharegpt_preferred", needs=("conversations", "chosen"),
        may=("rejected", "system", *FINISH_REASONS.values()),
        read=read_sharegpt_preferred, fits=lambda row: isinstance(row["chosen"], dict)
        and isinstance(row["chosen"].get("value", row["chosen"].get("content")), str),
        known_from="LLaMA-Factory's preference data (ranking: true)",
        example={"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
                 "rejected": {"from": "gpt", "value": "5"}},
    ),
    Form(
        name="chosen_rejected", needs=("chosen",), may=("rejected", "system", *FINISH_REASONS.values()),
        read=both("chosen", "rejected"),
        fits=lambda row: is_conversation(row["chosen"]) or (
            isinstance(row["chosen"], list | dict) and row.get("prompt") is None
        ),
        known_from="TRL with implicit prompts, UltraFeedback (its prompt and messages are not read)",
        example={"chosen": _HI, "rejected": _BAD},
    ),
    Form(
        name="prompt_chosen_rejected", needs=("prompt", "chosen"),
        may=("rejected", "system", *FINISH_REASONS.values()),
        read=answered("prompt", "chosen"), asks="prompt", response="chosen",
        known_from="TRL with explicit prompts (texts or messages), most preference data",
        example={"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    ),
    Form(
        name="messages", needs=("messages",), may=("system",), read=read_messages,
        known_from="OpenAI, TRL, UltraChat; also JSON text and a struct of lists",
        example={"messages": _HI},
    ),
    Form(
        name="sharegpt", needs=("conversations",), may=("system",), read=read_sharegpt,
        known_from="ShareGPT, OpenHermes, SlimOrca (from and value, or role and content)",
        example={"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ),
    Form(
        name="real_generated", needs=("real",), may=("generated", "system"), read=both("real", "generated"),
        known_from="the pairs that SPIN's authors released; generated counts as rejected",
        example={"real": _HI, "generated": _BAD},
    ),
    Form(
        name="prompt_completion", needs=("prompt", "completion"), may=("system",),
        read=answered("prompt", "completion"), asks="prompt", response="completion",
        known_from="TRL (texts or messages)",
        example={"prompt": "2 + 2?", "completion": "4"},
    ),
    Form(
        name="prompt_response", needs=("prompt", "response"), may=("system",),
        read=answered("prompt", "response"), asks="prompt", response="response",
        known_from="OpenRLHF and many others",
        example={"prompt": "2 + 2?", "response": "4"},
    ),
    Form(
        name="alpaca", needs=("instruction", "output"), may=("input", "system", "history"), read=read_alpaca,
        asks="instruction", response="output",
        known_from="Alpaca, LLaMA-Factory; an input follows the instruction after an empty line",
        example={"instruction": "Add.", "input": "2, 2", "output": "4"},
    ),
    Form(
        name="alpaca_preferred", needs=("instruction", "chosen"), may=("rejected", "input", "system", "history"),
        read=read_alpaca_preferred, asks="instruction", response="chosen",
        known_from="LLaMA-Factory's preference data in Alpaca's columns",
        example={"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"},
    ),
    Form(
        name="orca", needs=("question", "chosen"), may=("rejected", "system"), read=answered("question", "chosen"),
        asks="question", response="chosen",
        known_from="Orca DPO pairs",
        example={"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
    ),
    Form(
        name="question_answer", needs=("question", "answer"), may=("system",),
        read=answered("question", "answer"), asks="question", response="answer",
        known_from="GSM8K and other question sets; answer is the response",
        example={"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    ),
)  # fmt: skip
"""All forms; the first that matches a row wins."""

_ASKS = tuple(dict.fromkeys(form.asks for form in FORMS if form.asks is not None))
BY_NAME = {form.name: form for form in FORMS}
BESIDE = ("answer", "tools", "label", "chat_template_kwargs", "conversation_id")
"""Columns that every form may have: answer for grading, tools, KTO's label, TRL's variables of a row, and the name of
the conversation that the row is a part of."""
OTHER_NAMES = {"system_prompt": "system", "conversation": "conversations", "kto_tag": "label"}
"""Other names of columns, read where a row has no value under the usual name."""
_HINTS = {
    "prompt": ("query", "question", "problem", "instruction", "input", "inputs", "user", "request"),
    "response": ("output", "outputs", "solution", "completion", "target", "targets", "assistant", "answer", "answers"),
}
"""Other names of prompt and response, for hints only."""
MATERIAL = ("input", "context", "inputs")
"""Names of a column that belongs to the prompt beside the question, as in Dolly."""
EXPLANATIONS = ("solution", "rationale", "reasoning", "explanation", "thought", "thinking")
"""Columns whose text leads to a question's answer."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns that a text model cannot read."""
COLUMNS = tuple(dict.fromkeys([*(name for form in FORMS for name in (*form.needs, *form.may)), *BESIDE]))


def refuse_unknown_columns(data: DataConfig) -> None:
    """Raises ConfigError if ``data.columns`` names a column that no form reads."""
    for name in data.columns:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {_and(COLUMNS)}"
            raise ConfigError(f"data.columns.{name}: no form has such a column{hint}")


def mapped(content: Columns, data: DataConfig) -> Columns:
    """Renames a row's columns to those of the forms."""
    if data.columns:
        taken = set(data.columns.values())
        rest = {name: value for name, value in content.items() if name not in taken}
        content = rest | {ours: content[theirs] for ours, theirs in data.columns.items() if theirs in content}
    tagged = "label" in data.columns or ("kto_tag" in content and content.get("label") is None)
    for other, name in OTHER_NAMES.items():
        if other in content and content.get(name) is None:
            content = {(name if key == other else key): value for key, value in content.items() if key != name}
    if tagged and (said := str(content.get("label")).strip()) in _NUMBERS:
        content = content | {"label": _NUMBERS[said]}
    if not isinstance(content.get("chosen"), str):
        return content
    prompt = next((content[name] for name in _ASKS if content.get(name) is not None), None)
    said = unpacked(content["chosen"])
    if isinstance(said, list) and any(prompt in (each.get("content"), each.get("value")) for each in said):
        prompt = None  # chosen is the whole conversation, as in UltraFeedback
    chosen, _ = unpacked_responses(prompt, content["chosen"], content.get("rejected"))
    return content | {"chosen": chosen}


_NUMBERS = {"0": False, "0.0": False, "1": True, "1.0": True}
"""KTO's labels as numbers, read only of ``kto_tag`` and if ``data.columns`` maps ``label``: others name classes."""


def is_wanted(label: Any) -> bool | None:
    """Reads KTO's label, a boolean or its text; returns None for other values."""
    said = str(label).strip().lower()
    return said == "true" if isinstance(label, bool | str) and said in ("true", "false") else None


def form_of(row: Columns, data: DataConfig) -> Form | None:
    """Returns the form of a mapped row, or None; ``data.form`` takes precedence."""
    if data.form is not None:
        form = BY_NAME[data.form]
        return form if all(column in row for column in form.needs) else None
    near = _with_columns(tuple(row))
    return next((form for form in near if form.matches(row)), None) or next((f for f in near if len(f.needs) > 1), None)


@lru_cache(maxsize=1024)
def _with_columns(columns: tuple[str, ...]) -> tuple[Form, ...]:
    return tuple(form for form in FORMS if set(form.needs) <= set(columns))


def no_form(row: Columns, data: DataConfig, unread: Iterable[str] = ()) -> str:
    """Returns why a row has no form: the nearest form and its missing columns.

    Args:
        unread: names of the columns that were not read.
    """
    has = {*row, *unread}
    if path := _rows_within(row):
        return f"its rows are inside it; write them alone, one a line: jq -c '{path}' FILE > NEW.jsonl"
    if data.form is not None:
        lacks = [name for name in BY_NAME[data.form].needs if name not in has]
        return f"data.form {data.form} needs {_and(BY_NAME[data.form].needs)}; there is no {_and(lacks)}"
    if row.get("rejected") is not None and row.get("chosen") is None:
        return "has rejected, but no chosen"
    if isinstance(row.get("chosen"), str):
        return why_unasked(row, unread)

    def nearness(form: Form) -> tuple[float, int, bool]:
        return len(has & set(form.needs)) / len(form.needs), len(has & set(form.may)), form.name == "prompt_response"

    nearest = max(FORMS, key=nearness)
    known = has & {*nearest.needs, *nearest.may}
    needed = "needs messages, or prompt and response, or the columns of another form (docs/data.md)"
    if hint := _hint({name for name in has if _may_be_said(row.get(name))}):
        maps = ", ".join(f"{ours}: {json.dumps(theirs, ensure_ascii=False)}" for ours, theirs in hint.items())
        return f"{needed}; try data.columns: {{{maps}}}"
    if not known:
        return f"{needed}; data.columns maps names"
    if lacks := [name for name in nearest.needs if name not in has]:
        return f"{needed}; nearest is {nearest.name}, which lacks {_and(lacks)}"
    value = row.get(nearest.needs[0])
    found = "empty" if value is None else f"of type {type(value).__name__} and no list of messages"
    return f"{needed}; nearest is {nearest.name}, but {nearest.needs[0]} is {found}"


def why_unasked(row: Columns, unread: Iterable[str]) -> str:
    """Returns why ``chosen`` has no prompt, and what may be its prompt."""
    if python := python_text(row["chosen"], "chosen"):
        return python
    spelt = _spelt([*(name for name, value in row.items() if value is not None), *unread])
    asks = next((spelt[name] for name in ("prompt", *_HINTS["prompt"]) if name in spelt), None)
    why = "chosen is text, and there is no prompt that it answers"
    if asks is None or asks in _ASKS:
        return f"{why}; write the prompt into a column prompt, or chosen and rejected as lists of messages"
    return f"{why}; try data.columns: {{prompt: {json.dumps(asks, ensure_ascii=False)}}}"


def why_incomplete(row: Columns, form: Form, data: DataConfig) -> str | None:
    """Returns why question and answer alone would be learnt wrong.

    A longer explanation stands beside them, as in LIMO, or what the question is about, as in sql-create-context.
    """
    if form.name != "question_answer" or data.form is not None:
        return None
    least, spelt = len(str(row["answer"])), _spelt(row)
    texts = {name: row[name] for name in spelt.values() if isinstance(row[name], str) and row[name].strip()}
    longer = next((spelt[name] for name in EXPLANATIONS if len(texts.get(spelt.get(name, ""), "")) > least), None)
    about = next((spelt[name] for name in MATERIAL if spelt.get(name, "") in texts), None)
    if longer is None and about is None:
        return None
    asks, answer = data.columns.get("question", "question"), data.columns.get("answer", "answer")
    if about is None:
        maps = {"prompt": asks, "response": longer}
    else:
        maps = {"instruction": asks, "input": about, "output": longer or answer}
    columns = ", ".join(f"{ours}: {json.dumps(theirs, ensure_ascii=False)}" for ours, theirs in maps.items())
    unread = " and ".join(name for name in (longer, about) if name)
    return (
        f"answer would be the response to question alone, and {unread} would not be read; to read it, set "
        f"data.columns: {{{columns}}}; to learn answer alone, data.form: question_answer"
    )


def _rows_within(row: Columns) -> str | None:
    values = list(row.values())
    if len(values) > 1 and all(isinstance(each, dict) and _is_row(each) for each in values):
        return ".[]"
    for key, value in row.items():
        listed = isinstance(value, list) and bool(value)
        inner, path = (value[0], f"{jq_key(key)}[]") if listed else (value, jq_key(key))
        # Beside other columns, a dict counts as a row only under a key of _OF_ONE_ROW.
        if not isinstance(inner, dict) or key in COLUMNS or is_message(inner):
            continue
        if not listed and len(row) > 1 and key not in _OF_ONE_ROW:
            continue
        if _is_row(inner) or (listed and not set(row) & set(COLUMNS) and _hint(set(inner))):
            return path
        if below := _rows_within(inner):
            return path + below
    return None


_OF_ONE_ROW = ("row", "body")
"""Keys of a row in answers of the hub's server and in OpenAI's batches."""


def _is_row(value: Columns) -> bool:
    return any(form.matches(value) for form in _with_columns(tuple(value)))


def jq_key(key: str) -> str:
    """Returns jq's path to a key, for a command in single quotes."""
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
        return f".{key}"
    return "." + json.dumps(key, ensure_ascii=False).replace("'", "\\u0027")


def _spelt(names: Iterable[str]) -> dict[str, str]:
    """Returns columns by their names in lower case, without blanks and quotes."""
    return {name.strip().strip("'\"").lower(): name for name in sorted(names)}


def _hint(has: set[str]) -> dict[str, str]:
    spelt = _spelt(has)
    for form in FORMS:
        if all(name in spelt for name in form.needs):
            return {name: spelt[name] for name in (*form.needs, *form.may) if spelt.get(name, name) != name}
    words = {
        ours: spelt[found]
        for ours, theirs in _HINTS.items()
        if (found := next((name for name in (ours, *theirs) if name in spelt), None))
    }
    if len(words) < len(_HINTS):
        return {}
    rest = [spelt[name] for name in MATERIAL if name in spelt and spelt[name] not in words.values()]
    if rest:  # the form prompt_response would leave it out of the prompt
        words = {"instruction": words["prompt"], "input": rest[0], "output": words["response"]}
    return {ours: theirs for ours, theirs in words.items() if ours != theirs}


def _may_be_said(value: Any) -> bool:
    """Returns False for lists and dicts that are no messages, such as SQuAD's answers."""
    first = value[0] if isinstance(value, list) and value else value
    return not isinstance(value, dict | list) or is_message(first)


def _and(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))


def find_form(rows: Iterable[SourceRow], data: DataConfig) -> Form | None:
    """Returns the form of a file's first rows; None if no row is a JSON object.

    Raises:
        DataError: no row has a known form, or two rows have different forms.
    """
    found: dict[str, SourceRow] = {}
    strange: tuple[str, str] | None = None
    for row in rows:
        if row.content is None:
            continue
        content = mapped(row.content, data)
        form = form_of(content, data)
        if form is not None:
            found.setdefault(form.name, row)
        elif strange is None:
            has = _and([*row.content, *row.unread]) or "no column"
            strange = row.origin, f"{no_form(content, data, row.unread)} (it has {has})"
    refuse_two_forms({name: (row.origin, shown(row.content)) for name, row in found.items()})
    if not found and strange is not None:
        raise DataError(": ".join(strange))
    return BY_NAME[next(iter(found))] if found else None


def refuse_two_forms(found: dict[str, tuple[str, str]]) -> None:
    """Raises DataError if one file's ``{form: (origin, row)}`` has two forms."""
    if len(found) < 2:
        return
    (one, (origin, first)), (other, (where, second)) = list(found.items())[:2]
    raise DataError(
        f"{origin}: is of the form {one} ({first}), but {where} is of the form {other} ({second}); split the file, or "
        "name one form by data.form"
    )


def shown(content: Any) -> str:
    """Returns a row as one short line."""
    text = json.dumps(content, ensure_ascii=True, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


_SHOWN = 120
"""Most characters of a row in a message."""


def ignored_in(row: Mapping[str, Any], form: Form) -> list[str]:
    """Returns the columns and message keys that the row's form does not read."""
    names = list(_unread(form.name, tuple(row)))
    if row.get("label") is not None and is_wanted(row["label"]) is None:
        names.append("label")
    if form.asks is not None:
        responses = unpacked_responses(row.get(form.asks), row.get(form.response), row.get("rejected"))
        row = {**row, form.asks: unpacked(row.get(form.asks)), form.response: responses[0], "rejected": responses[1]}
    for column in (*form.needs, *form.may):
        value = row.get(column)
        if isinstance(value, str) and form.asks is None and column != "system":
            value = decoded(value)
        if isinstance(value, list | dict):
            names += [f"{column}.{key}" for key in sorted(unread_keys(value))]
    return names


@lru_cache(maxsize=1024)
def _unread(form: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    read = {*BY_NAME[form].needs, *BY_NAME[form].may, *BESIDE}
    return tuple(name for name in columns if name not in read)


def as_markdown() -> str:
    """Returns the table of forms for docs/data.md."""
    lines = ["| `data.form` | columns | may have | comes from | a row |", "|---|---|---|---|---|"]
    for form in FORMS:
        needs, may = (", ".join(f"`{name}`" for name in names) for names in (form.needs, form.may))
        example = json.dumps(form.example).replace("|", "\\|")
        lines.append(f"| `{form.name}` | {needs} | {may or '–'} | {form.known_from} | `{example}` |")
    return "\n".join(lines) + "\n"
