"""Rendering of one slice of the data in a process of its own."""

import gc
import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray

from spin_ray.errors import DataError, StageError, UserError
from spin_ray.inputs.conversations import Found, Unusable
from spin_ray.inputs.files import TEXTS, kind_of
from spin_ray.inputs.forms import shown
from spin_ray.inputs.prompt_rows import PromptTask, Row, rows_of
from spin_ray.inputs.sources import Slice, SourceRow, read_slice
from spin_ray.loop.stages.prompts.quarantine import QUARANTINE_SCHEMA, quarantine_row
from spin_ray.run_dir.schemas import PROMPT_SCHEMA
from spin_ray.run_dir.storage import Storage, table_to_bytes
from spin_ray.runtime.actors import earlier_tries

TRIES = 6
"""Processes that may die with a slice before an error names it."""
ROWS_AT_A_TIME = 1024
"""Rows held as Python objects by a task."""
_SLICE_SCHEMA = PROMPT_SCHEMA.append(pa.field("origin", pa.string())).append(pa.field("raw", pa.binary()))
"""Rows of a slice, with ``origin`` and ``raw`` for the quarantine."""


@dataclass(frozen=True, slots=True)
class RenderedSlice:
    """A rendered slice, with good rows in the file ``name``-rows and unusable rows in ``name``-bad."""

    name: str
    ids: np.ndarray
    """64-bit prompt ids of the good rows."""
    forms: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Place and text of the first good row, by form."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of good rows with an unread column, by column."""
    read: int = 0
    """Number of rows in the slice, unusable ones included. With ``data.turns: all`` a good one makes several ids."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Self:
        """Returns what ``RenderSlice`` answered.

        Raises:
            DataError: it answered with an error.
            StageError: its processes died.
        """
        if answer["died"]:
            raise StageError(answer["died"])
        if answer["error"]:
            raise DataError(answer["error"])
        forms, ignored, rows = json.loads(answer["read"])
        ids = np.frombuffer(answer["ids"], dtype=np.uint64)
        first = {form: (where, row) for form, (where, row) in forms.items()}
        return cls(answer["name"], ids, first, Counter(ignored), rows)


class RenderSlice:
    def __init__(self, storage: Storage, stage: str, task: PromptTask) -> None:
        self._storage, self._stage, self._pickled = storage, stage, ray.cloudpickle.dumps(task)

    @property
    def _task(self) -> PromptTask:
        return _unpickled(self._pickled)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Returns a UserError as a value, because Ray keeps only an exception's text."""
        answer = {"name": item["name"], "error": "", "died": "", "ids": b"", "read": ""}
        if (tries := earlier_tries()) >= TRIES:
            return answer | {"died": _died(item, tries)}
        read = _Read()
        try:
            with _busy_with_rows():
                ids = self._render(item, read)
            return answer | {"ids": ids, "read": json.dumps([read.forms, read.ignored, read.rows])}
        except UserError as error:
            return answer | {"error": str(error)}

    def _render(self, item: dict[str, Any], read: "_Read") -> bytes:
        name = item["name"]
        good, bad = [_SLICE_SCHEMA.empty_table()], [QUARANTINE_SCHEMA.empty_table()]
        ids = bytearray()
        reader = read_slice(Slice(item["uri"], item["start"], item["stop"]), self._task.data.columns)
        while sources := list(islice(reader, ROWS_AT_A_TIME)):
            read.rows += len(sources)
            rows: list[Row] = []
            unusable: list[Row] = []
            for source, found in zip(sources, rows_of(sources, self._task, read.note), strict=True):
                if isinstance(found, Unusable):
                    unusable.append(quarantine_row(self._stage, source.origin, found.reason, found.detail, source.raw))
                    continue
                if not found:  # of the other part
                    read.rows -= 1
                for row in found:
                    row["origin"], row["raw"] = source.origin, source.raw
                rows += found
            good.append(pa.Table.from_pylist(rows, _SLICE_SCHEMA))
            bad.append(pa.Table.from_pylist(unusable, QUARANTINE_SCHEMA))
            ids += bytes.fromhex("".join([row["prompt_id"] for row in rows]))
        self._storage.replace(f"{name}-rows", table_to_bytes(pa.concat_tables(good)))
        self._storage.replace(f"{name}-bad", table_to_bytes(pa.concat_tables(bad)))
        return bytes(ids)


def _died(item: dict[str, Any], times: int) -> str:
    unit = "bytes" if kind_of(item["uri"]) in TEXTS else "groups of rows"
    return (
        f"{item['uri']}, {unit} {item['start']} to {item['stop']}: a process that rendered these rows died {times} "
        "times, most likely as memory ran out; free memory on its machine, or shorten or remove huge rows, then "
        "run the command again"
    )


@lru_cache(maxsize=1)
def _unpickled(task: bytes) -> PromptTask:
    """Opens the tokenizer once per process, as large vocabularies are slow to load."""
    return pickle.loads(task)  # noqa: S301 (from this run's driver, through Ray)


class _Read:
    def __init__(self) -> None:
        self.forms: dict[str, tuple[str, str]] = {}
        self.ignored: Counter[str] = Counter()
        self.rows = 0

    def note(self, source: SourceRow, found: Found, unread: list[str]) -> None:
        if found.form is None:  # a question
            return
        if found.form.name not in self.forms:
            self.forms[found.form.name] = source.origin, shown(source.content)
        if unread:
            self.ignored.update(unread)


@contextmanager
def _busy_with_rows() -> Iterator[None]:
    """Switches off the tokenizer's threads, and the garbage collector, which rows trigger without making cycles."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
