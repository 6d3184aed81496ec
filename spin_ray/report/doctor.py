"""Output of ``spin-ray doctor`` about data, template and precision."""

from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Train, name_of, sources_of
from spin_ray.inputs.check import Inputs
from spin_ray.inputs.findings import Finding, TemplateFacts
from spin_ray.inputs.graders import graded_part, graders_of, refuse_no_answer
from spin_ray.inputs.held_out import none_held_out
from spin_ray.inputs.mixture import warn_of_limit
from spin_ray.inputs.prompt_rows import PromptTask
from spin_ray.inputs.survey import UNLIMITED, Survey, survey
from spin_ray.runtime.precision import faster_precision

_BINS, _BAR = 8, 40
_MOST_CHARACTERS = 1500
_MOST_FILES = 5
_SEVERITY = {"note": "cyan", "warning": "yellow", "error": "red"}
_PROMPT, _RESPONSE, _SPECIAL = "cyan", "green", "bold magenta"


def look_at_data(config: SpinConfig, inputs: Inputs, *, every_row: bool) -> list[Survey]:
    """Surveys each source of training, held-out and question rows.

    Raises:
        DataError: a file cannot be read.
    """
    task = replace(PromptTask.of(config, str(inputs.model.path)), max_length=UNLIMITED)

    def look(given: Train | None, each: PromptTask, held_out: Set[str] = frozenset()) -> list[Survey]:
        found: list[Survey] = []
        options: dict[str, Any] = {"every_row": every_row, "held_out": held_out}
        for source in sources_of(given):
            earlier = {row for before in found for row in before.ids}
            found.append(survey(source.path, each, config.model.max_length, earlier=earlier, **options))
        return found

    of_train = replace(PromptTask.of(config, str(inputs.model.path), trained=True), max_length=UNLIMITED)
    of_questions = replace(task, labelled=False, part=None)
    heldout = look(inputs.heldout, task)
    if config.data.heldout_fraction:
        for each in heldout:
            each.source += " (held out)"
    held_out = set() if config.data.keep_leaks else {row for each in heldout for row in each.ids}
    trained = look(inputs.train, of_train, held_out)
    return [*trained, *heldout, *(look(inputs.questions, of_questions) if inputs.questions else [])]


def check_surveys(config: SpinConfig, inputs: Inputs, surveys: Sequence[Survey]) -> list[str]:
    """Returns warnings of sources that limit their mixture, where every row was read.

    Raises:
        DataError: a run would refuse the rows, or there are too few usable rows or no answers.
    """
    for found in surveys:
        found.check(config.data)
    rest, given = iter(surveys), {name: getattr(inputs, name) for name in ("train", "heldout", "questions")}
    of = {name: list(islice(rest, len(sources_of(each)))) for name, each in given.items()}
    if config.data.heldout_fraction and not any(found.usable or not found.whole for found in of["heldout"]):
        refused = next((found for found in of["heldout"] if found.refused), None)
        raise (
            refused.refusal(config.data)
            if refused
            else none_held_out(config.data.heldout_fraction, name_of(inputs.train))
        )
    for setting, grade in graders_of(config).items():
        if rows := of[graded_part(setting)]:
            sample = "" if all(found.whole for found in rows) else " (a sample; --all reads every row)"
            name = ", ".join(found.source for found in rows) + sample
            refuse_no_answer(name, [answer for found in rows for answer in found.answers], grade, setting)
    warnings = [
        warn_of_limit(sources_of(each), [found.drawable for found in of[name]], f"data.{name}")
        for name, each in given.items()
        if isinstance(each, tuple)
        and all(found.whole for found in of[name])
        and not (name == "heldout" and config.data.heldout_fraction)  # all that it has is taken
    ]
    return [warning for warning in warnings if warning]


def print_survey(found: Survey, console: Console) -> None:
    """Prints counts, reasons of refusal and a histogram of lengths, in 80 columns."""
    forms = ", ".join(
        f"{name} ({count:,} rows)" if len(found.forms) > 1 else name for name, count in found.forms.items()
    )
    files = "1 file" if len(found.files) == 1 else f"{len(found.files):,} files"
    rows = "every row read" if found.whole else f"first {found.read:,} rows read; --all reads every row"
    mark = "[green]ok[/]" if found.usable else "[red]no[/]"
    console.print(f"{mark} data", end=" ")
    _line(console, f"{found.source}: {files}, form {forms or 'none'}, {rows}")
    _line(
        console,
        f"   {found.usable:,} of {found.read:,} usable" + (f"; refused: {found.counts}" if found.counts else ""),
    )
    if found.leaked:
        _line(
            console,
            f"   {found.leaked:,} rows are held out, too, and are not trained on (data.keep_leaks: true keeps them)",
        )
    if found.overlapping:
        _line(console, f"   {found.overlapping:,} rows are in an earlier source, too, and are taken from that one")
    if found.ignored:
        _line(console, f"   {not_read(found)}")
    if found.skipped:
        _line(console, f"   {len(found.skipped):,} files are no data and not read, first {found.skipped[0]}")
    for reason, refusal in found.first.items():
        _line(console, f"   first {reason}: {refusal.origin}: {refusal.detail}")
    if found.lengths:
        _line(
            console,
            f"   prompt + response, tokens; {found.share_too_long:.1%} do not fit model.max_length {found.max_length}",
        )
        for line in histogram(found.lengths):
            _line(console, f"   {line}")


def not_read(found: Survey) -> str:
    """Returns the columns and keys that are not read, with their rows."""
    return "not read: " + ", ".join(f"{name} ({count:,} rows)" for name, count in found.ignored.items())


def histogram(lengths: Sequence[int]) -> list[str]:
    """Returns lines of at most 72 characters: range, bar, count."""
    low, high = min(lengths), max(lengths)
    width = (high - low) // _BINS + 1
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    lines = []
    for number, count in enumerate(counts):
        first, last = low + number * width, min(low + (number + 1) * width - 1, high)
        bar = "█" * max(round(count / max(counts) * _BAR), 1 if count else 0)
        lines.append(f"{first:>7,} to {last:>7,} {bar:<{_BAR}} {count:,}")
    return lines


def print_example(found: Survey, tokenizer: Any, console: Console) -> None:
    """Prints one row as the model reads it, special tokens included."""
    if found.example is None:
        return
    for name, colour in (("prompt", _PROMPT), ("response", _RESPONSE)):
        ids = found.example["prompt_ids" if name == "prompt" else "real_ids"]
        console.print(f"   {name}, {len(ids):,} tokens:")
        console.print(_as_read(tokenizer, ids, colour), soft_wrap=True)


def _as_read(tokenizer: Any, ids: list[int], colour: str) -> Text:
    text = visible(tokenizer.decode(ids, skip_special_tokens=False))
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} […] {text[-half:]}"
    shown = Text(text, style=colour)
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    shown.highlight_words(names, style=_SPECIAL)
    return shown


def visible(text: str) -> str:
    """Escapes control characters, so that data cannot steer a terminal."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text
    )


def print_template(facts: TemplateFacts, console: Console) -> None:
    """Prints what the chat template writes around a message and removes from a response."""
    _line(
        console,
        f"   the template writes {_quoted(facts.before)} before a user's message and {_quoted(facts.after)} after it",
    )
    if facts.strips:
        _line(console, f"   it takes from a response: {', '.join(facts.strips)}")
    else:
        _line(console, "   it takes nothing from a response")


def print_findings(findings: Sequence[Finding], unopened: Sequence[Path], console: Console) -> None:
    """Prints the findings, and the files of the model folder that are not opened."""
    for finding in findings:
        console.print(f"   [{_SEVERITY[finding.severity]}]{finding.severity}[/]", end=" ")
        _line(console, finding.sentence)
    if unopened:
        names = ", ".join(path.name for path in unopened[:_MOST_FILES]) + (", …" if len(unopened) > _MOST_FILES else "")
        _line(console, f"   {len(unopened)} files that a trainer left in the model folder are not opened: {names}")


def precision_and_reason(config: SpinConfig, before: SpinConfig | None) -> tuple[str, str]:
    """Returns the precision of training and its reason; ``before`` is the recipe of a resumed run."""
    if config.train.precision != "auto":
        return config.train.precision, "the recipe says so (train.precision)"
    if before is not None and before.train.precision != "auto":
        return before.train.precision, "the run began with it"
    reason = (
        "the format of GPUs that have it" if config.train.resources.gpus else "the faster one on this machine's CPU"
    )
    return faster_precision(config.train.resources), f"{reason} (train.precision: auto)"


def as_json(surveys: Sequence[Survey], facts: TemplateFacts, tokenizer: Any) -> dict[str, Any]:
    data = []
    for found in surveys:
        one: dict[str, Any] = {
            "source": found.source, "files": found.files, "every_row_read": found.whole,
            "forms": dict(found.forms), "rows": found.read, "usable": found.usable, "refused": dict(found.refused),
            "leaked": found.leaked, "overlapping": found.overlapping, "ignored": dict(found.ignored),
            "skipped_files": found.skipped,
            "first_refused": {reason: asdict(refusal) for reason, refusal in found.first.items()},
            "share_too_long": found.share_too_long, "max_length": found.max_length,
            "lengths": _quantiles(found.lengths),
        }  # fmt: skip
        if found.example is not None:
            ids = {name: found.example[name] for name in ("prompt_ids", "real_ids")}
            texts = {name.replace("_ids", ""): tokenizer.decode(each) for name, each in ids.items()}
            one["example"] = ids | texts
        data.append(one)
    return {"data": data, "template": asdict(facts)}


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Returns quantiles, interpolated and rounded."""
    places = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    if not lengths:
        return {}
    return dict(zip(places, map(round, np.quantile(lengths, list(places.values())).tolist()), strict=True))


def _quoted(text: str) -> str:
    text = text if len(text) <= 160 else f"{text[:80]}[…]{text[-60:]}"
    return repr(text)


def _line(console: Console, text: str) -> None:
    console.print(visible(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
