"""Survey of a data set: forms, refusals, lengths, and one row as the model sees it."""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice

from spin_ray.config.sections import DataConfig
from spin_ray.errors import DataError
from spin_ray.inputs.conversations import Found, Unusable
from spin_ray.inputs.forms import Form, form_of, mapped, refuse_two_forms, shown
from spin_ray.inputs.held_out import Part
from spin_ray.inputs.prompt_rows import PromptTask, Row, rows_of
from spin_ray.inputs.sources import Slice, SourceRow, find_files, read_slice, skipped_files, split

SAMPLE_ROWS = 2000
"""Most rows read without ``--all``."""
UNLIMITED = sys.maxsize
ALL_HELD_OUT = (
    "all rows are held out, too: every row of data.heldout is, also beyond evaluation.max_rows; give other rows as "
    "data.heldout, or data.heldout_fraction"
)
NONE_TRAINED = "data.heldout_fraction holds every conversation out; lower it, or add rows"
_ROWS_AT_A_TIME = 256
_ANSWERS = 64


@dataclass(frozen=True, slots=True)
class Refusal:
    origin: str
    detail: str


@dataclass(slots=True)
class Survey:
    source: str
    max_length: int
    files: list[str]
    skipped: list[str]
    """Files that are no data."""
    whole: bool
    """True if every row was read."""
    read: int = 0
    usable: int = 0
    """Rows that are not refused."""
    forms: Counter[str] = field(default_factory=Counter)
    first_of_form: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """Place and text of each form's first readable row, by file."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Rows by unread column or message key."""
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, Refusal] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    """Tokens of prompt and longest response, also of too long rows."""
    responses: list[int] = field(default_factory=list)
    """Tokens of the human response, for the same rows."""
    ids: set[str] = field(default_factory=set)
    answers: list[str] = field(default_factory=list)
    """Answers of the first usable rows that have one."""
    made: int = 0
    """Rows made of those that fit ``max_length``: several of one with ``data.turns: all``."""
    drawable: int = 0
    """Rows made that a run can take: the first of each that is neither held out nor in an earlier source."""
    leaked: int = 0
    """Rows made that are also held out."""
    overlapping: int = 0
    """Rows made that are also in an earlier source, each once."""
    elsewhere: int = 0
    """Usable rows of which a run takes nothing, because they are held out or in an earlier source."""
    example: Row | None = None
    held_out: Set[str] = frozenset()
    """Prompt ids of held-out rows."""
    earlier: Set[str] = frozenset()
    """Prompt ids of earlier sources."""
    part: Part | None = None
    """Part of the source that was read, by ``data.heldout_fraction``; None: all."""

    @property
    def share_too_long(self) -> float:
        return self.refused["too_long"] / max(self.read, 1)

    @property
    def counts(self) -> str:
        """Refused rows by reason, e.g. ``3 malformed, 1 too_long``."""
        return ", ".join(f"{count} {reason}" for reason, count in self.refused.most_common())

    def check(self, data: DataConfig) -> None:
        """Raises DataError if a run would refuse the data."""
        for forms in self.first_of_form.values():
            refuse_two_forms(forms)
        if self.whole and self.made and self.leaked == self.made:
            raise DataError(f"{self.source}: {ALL_HELD_OUT}")
        if self.part == "held out":
            return  # the trained part stands for the source
        if self.part == "trained" and not self.read:
            raise DataError(f"{self.source}: {NONE_TRAINED}")
        bad = self.refused.total()
        if self.usable and bad <= data.max_quarantine_fraction * (self.read - self.elsewhere):
            return
        raise self.refusal(data) if bad else DataError(f"{self.source}: holds no rows")

    def refusal(self, data: DataConfig) -> DataError:
        """Returns the error of rows of which too many are refused, one at least."""
        bad, share = self.refused.total(), data.max_quarantine_fraction
        reason = self.refused.most_common(1)[0][0]
        first = self.first[reason]
        of = "" if self.whole else " that were read (--all reads every row)"
        limit = f", more than data.max_quarantine_fraction {share:g}" if self.usable else ""
        return DataError(
            f"{self.source}: {bad} of {self.read - self.elsewhere} rows{of} cannot be used ({self.counts}){limit}; "
            f"first: {first.origin}: {reason}: {first.detail}"
        )


def survey(
    source: str,
    task: PromptTask,
    max_length: int,
    *,
    every_row: bool = False,
    held_out: Set[str] = frozenset(),
    earlier: Set[str] = frozenset(),
) -> Survey:
    """Reads the first rows of every file, or all rows, as a run does.

    Args:
        task: task of length ``UNLIMITED``, so that too long rows are measured.
        max_length: longest row that a run takes.
        held_out: prompt ids that are not trained on.
        earlier: prompt ids of earlier sources.

    Raises:
        DataError: a file is missing, empty or damaged.
    """
    files = find_files(source)
    pieces = split(files)
    found = Survey(
        source, max_length, files, skipped_files(source), whole=True, held_out=held_out, earlier=earlier, part=task.part
    )
    quota = None if every_row else math.ceil(SAMPLE_ROWS / len(files))
    rows = _rows(pieces, quota, found, task.data)

    forms: dict[str, Form | None] = {}

    def note(source: SourceRow, row: Found, unread: list[str]) -> None:
        found.ignored.update(unread)
        forms[source.origin] = row.form

    while placed := list(islice(rows, _ROWS_AT_A_TIME)):
        results = rows_of([row for _, row in placed], task, note)
        for (uri, row), result in zip(placed, results, strict=True):
            form = forms.pop(row.origin, None) or _form_of(row, task.data)
            _count(found, uri, row, form, result, task)
        if not every_row and found.read >= SAMPLE_ROWS:
            found.whole = found.whole and next(rows, None) is None
            break
    return found


def _rows(
    pieces: Sequence[Slice], quota: int | None, found: Survey, data: DataConfig
) -> Iterator[tuple[str, SourceRow]]:
    taken = Counter[str]()
    for piece in pieces:
        if quota is not None and taken[piece.uri] >= quota:
            found.whole = False
            continue
        for row in read_slice(piece, data.columns):
            if quota is not None and taken[piece.uri] >= quota:
                found.whole = False
                break
            taken[piece.uri] += 1
            yield piece.uri, row


def _form_of(source: SourceRow, data: DataConfig) -> Form | None:
    return form_of(mapped(source.content, data), data) if source.content is not None else None


def _count(
    found: Survey, uri: str, source: SourceRow, form: Form | None, result: list[Row] | Unusable, task: PromptTask
) -> None:
    if not result:  # of the other part (data.heldout_fraction)
        return
    found.read += 1
    found.forms[form.name if form else "unknown"] += 1
    if isinstance(result, Unusable):
        has = ", ".join([*(source.content or ()), *source.unread]) or "no column"
        of = "" if form or source.content is None else f" (it has {has})"
        _refuse(found, source, result.reason, result.detail + of)
        return
    if form and task.labelled:
        found.first_of_form.setdefault(uri, {}).setdefault(form.name, (source.origin, shown(source.content)))
    lengths = [_length(row) for row in result]
    found.lengths += lengths
    found.responses += [len(row["real_ids"]) for row in result]
    if max(lengths) > found.max_length:
        detail = f"{max(lengths)} tokens, model.max_length is {found.max_length}"
        _refuse(found, source, "too_long", detail)
        return
    ids = [row["prompt_id"] for row in result]
    new = {each for each in ids if each not in found.ids}
    leaked = [each for each in ids if each in found.held_out]
    found.ids.update(new)
    found.made += len(ids)
    found.leaked += len(leaked)
    if not new and len(leaked) < len(ids):
        _refuse(found, source, "duplicate", "the same prompt and response as an earlier row")
        return
    drawable = new - found.held_out - found.earlier
    found.overlapping += len(new & found.earlier - found.held_out)
    found.drawable += len(drawable)
    found.elsewhere += not drawable
    found.usable += 1
    first = next((row for row in result if row["prompt_id"] in new), result[0])
    if (answer := first["answer_text"]) is not None and len(found.answers) < _ANSWERS:
        found.answers.append(answer)
    found.example = found.example or first


def _length(row: Row) -> int:
    return len(row["prompt_ids"]) + max(1, len(row["real_ids"]), len(row["rejected_ids"] or []))


def _refuse(found: Survey, source: SourceRow, reason: str, detail: str) -> None:
    found.refused[reason] += 1
    found.first.setdefault(reason, Refusal(source.origin, detail))
