"""Prompt rows, rendered and tokenised from slices of the data, one Ray task per slice.

Duplicates and unusable rows go to RUN/quarantine with the reason.
"""

import gc
import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from math import ceil
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.config.sections import Source, Train, name_of, sources_of
from spin_ray.errors import DataError, StageError, UserError, last_line
from spin_ray.inputs.conversations import Found, Unusable
from spin_ray.inputs.forms import refuse_two_forms, shown
from spin_ray.inputs.held_out import none_held_out
from spin_ray.inputs.mixture import draw, warn_of_limit
from spin_ray.inputs.prompt_rows import PromptTask, Row, rows_of
from spin_ray.inputs.rendering import ChatRenderer
from spin_ray.inputs.sources import Slice, SourceRow, files_digest, find_files, read_slice, skipped_files, split
from spin_ray.inputs.survey import ALL_HELD_OUT, NONE_TRAINED
from spin_ray.run_dir.artefact import Artefact, FileEntry
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PROMPT_SCHEMA
from spin_ray.run_dir.storage import ATTEMPTS, Storage, table_from_bytes, table_to_bytes
from spin_ray.runtime.waiting import with_deadline

logger = logging.getLogger(__name__)

QUARANTINE_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("stage", "origin", "reason", "detail")] + [pa.field("row", pa.binary())]
)
_SLICE_SCHEMA = PROMPT_SCHEMA.append(pa.field("origin", pa.string())).append(pa.field("raw", pa.binary()))
"""Rows of a slice, with ``origin`` and ``raw`` for the quarantine."""
LEAK = "leak"
"""Reason of a training row that is also held out."""
OVERLAP = "overlap"
"""Reason of a row that is also in an earlier source."""
_ELSEWHERE = (LEAK, OVERLAP)
"""Reasons of rows that do not count as unusable."""
ROWS_AT_A_TIME = 1024
"""Rows held as Python objects by a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOf:
    """Rows that a run reads."""

    target: Artefact
    given: Train
    setting: str
    """Name of the setting in the recipe that gives them."""
    max_rows: int | None
    labelled: bool = True
    """False for questions."""
    trained: bool = False
    """True for rows that are trained on."""
    without: Artefact | None = None
    """Held-out rows, or their ids. They are left out, or only counted with ``data.keep_leaks``."""
    every_id: Artefact | None = None
    """Artefact for the ids of all usable rows, which is made if the rows are cut."""

    @classmethod
    def held_out(cls, run_dir: RunDir, config: SpinConfig, given: Train) -> Self:
        """Returns the rows to measure on."""
        return cls(
            target=run_dir.heldout, given=given, setting="data.heldout", max_rows=config.evaluation.max_rows,
            every_id=run_dir.heldout_ids,
        )  # fmt: skip

    @classmethod
    def training(cls, run_dir: RunDir, config: SpinConfig, given: Train, without: Artefact | None = None) -> Self:
        """Returns the rows to train on."""
        return cls(
            target=run_dir.prompts, given=given, setting="data.train", max_rows=config.data.max_rows, trained=True,
            without=without,
        )  # fmt: skip


def run(run_dir: RunDir, config: SpinConfig, tokenizer: str, rows: RowsOf) -> None:
    """Commits the rows as ``rows.target``.

    Raises:
        DataError: the data is missing or damaged, a file has two forms, or too many rows are unusable.
        StageError: rendering failed.
    """
    artefact, train = rows.target, rows.given
    source, sources = name_of(train), sources_of(train)
    files_of = [find_files(each.path) for each in sources]
    files = [file for each in files_of for file in each]
    task = PromptTask.of(
        config, tokenizer, labelled=rows.labelled, trained=rows.trained, date=run_dir.date()
    ).prepared()
    inputs = {"data": files_digest(files), "chat_template": template_digest(task.renderer)}
    settings: dict[str, Any] = {
        "max_length": config.model.max_length,
        "turns": config.data.turns,
        "system": config.data.system,
        "max_rows": rows.max_rows,
        "part_rows": config.generation.shard_rows,
    }
    is_drawn = not isinstance(train, str) and task.part != "held out"
    if is_drawn:
        settings |= {"sources": [each.model_dump() for each in sources], "seed": config.seed}
    if task.part:
        settings["heldout_fraction"] = config.data.heldout_fraction
    if artefact.already_made(inputs, settings):
        return
    with run_dir.stage(artefact.path) as counted:
        _tell_skipped(sources)
        pieces_of = [split(each) for each in files_of]
        pieces = [piece for each in pieces_of for piece in each]
        source_of = [number for number, each in enumerate(pieces_of) for _ in each]
        folder = f"{ATTEMPTS}/{artefact.path}-{digest([inputs, settings])[:16]}"
        slices = _render(pieces, folder, _RenderSlice(run_dir.storage, artefact.path, task), source)
        if task.part == "held out" and not any(each.read for each in slices):
            raise none_held_out(config.data.heldout_fraction or 0, source)
        _refuse_mixed_files(slices, [piece.uri for piece in pieces])
        if ignored := sum((each.ignored for each in slices), Counter[str]()):
            logger.warning("%s: not read: %s", source, ", ".join(f"{n} in {k} rows" for n, k in ignored.most_common()))
        leaked = _ids_of(rows.without)
        if config.data.keep_leaks and leaked is not None:
            counted["leaks_kept"] = _count_kept_leaks(slices, leaked, source)
            leaked = None
        firsts = _first_of_each([each.ids for each in slices], source_of, rows.max_rows, leaked)
        if is_drawn:
            counted["sources"] = _draw(firsts, sources, source_of, config.seed, rows.setting)
        if rows.every_id is not None:
            _commit_ids(rows.every_id, slices, firsts, inputs, settings)
        entries, reasons = _finish(run_dir.storage, slices, artefact, firsts, settings["part_rows"])
        quarantined = sum(reasons, Counter[str]())
        counted |= {"rows": sum(entry.rows or 0 for entry in entries.values()), "quarantined": quarantined.total()}
        if task.part != "held out" or not any(len(each.ids) for each in slices):  # its sources are judged in training
            for read in _by_source(sources, source_of, slices, reasons):
                if task.part == "trained" and not read.read:
                    raise DataError(f"{read.source}: {NONE_TRAINED}")
                if task.part is None or read.read:
                    _check_quarantine(run_dir, config, artefact, read)
        artefact.commit(entries, inputs, settings, counts=dict(quarantined))
        run_dir.storage.delete(folder)


def _render(pieces: Sequence[Slice], folder: str, render: "_RenderSlice", source: str) -> list["_Slice"]:
    """Renders slices in Ray tasks and keeps their order. A task has a CPU, as each process imports for seconds."""
    items = [asdict(piece) | {"name": f"{folder}/{index:06d}"} for index, piece in enumerate(pieces)]
    rendered = ray.data.from_items(items, override_num_blocks=len(items)).map(render, num_cpus=1)
    try:
        found = with_deadline(rendered.iter_rows(), 3600, 3600, "a slice of the data")
        return sorted((_rendered(row) for row in found), key=lambda slice_: slice_.name)
    except ray.exceptions.RayTaskError as error:
        raise StageError(f"{source}: cannot be rendered: {last_line(error)}; run the command again") from error


def _refuse_mixed_files(slices: list["_Slice"], uris: list[str]) -> None:
    forms: dict[str, dict[str, tuple[str, str]]] = {}
    for uri, each in zip(uris, slices, strict=True):
        for form, row in each.forms.items():
            forms.setdefault(uri, {}).setdefault(form, row)
    for found in forms.values():
        refuse_two_forms(found)


def _ids_of(prompts: Artefact | None) -> np.ndarray | None:
    if prompts is None:
        return None
    ids = [bytes.fromhex(prompt_id) for table in prompts.tables() for prompt_id in table["prompt_id"].to_pylist()]
    return np.frombuffer(b"".join(ids), dtype=np.uint64)


def _count_kept_leaks(slices: list["_Slice"], leaked: np.ndarray, source: str) -> int:
    count = sum(int(np.isin(each.ids, leaked).sum()) for each in slices)
    if count:
        logger.warning(
            "%s: %d rows are held out, too, and are trained on (data.keep_leaks): evaluations on them say little",
            source, count,
        )  # fmt: skip
    return count


def _draw(
    firsts: list["_Masks"], sources: tuple[Source, ...], source_of: list[int], seed: int, setting: str
) -> dict[str, int]:
    usable = [0] * len(sources)
    for number, masks in zip(source_of, firsts, strict=True):
        usable[number] += int(masks.keep.sum())
    shares = draw([masks.keep for masks in firsts], sources, source_of, seed, setting)
    drawn = {source.path: share for source, share in zip(sources, shares, strict=True)}
    logger.info("rows drawn: %s", ", ".join(f"{share:,} of {path}" for path, share in drawn.items()))
    if warning := warn_of_limit(sources, usable, setting):
        logger.warning("%s", warning)
    return drawn


def _commit_ids(
    target: Artefact, slices: list["_Slice"], firsts: list["_Masks"], inputs: dict[str, str], settings: dict[str, Any]
) -> None:
    """Commits the ids of all usable rows, unless every one of these rows is kept."""
    ids = np.unique(np.concatenate([each.ids for each in slices]))
    if sum(int(masks.keep.sum()) for masks in firsts) == len(ids):
        return
    target.storage.delete(target.path)  # of an attempt whose rows were never committed
    text = ids.tobytes().hex()
    table = pa.table({"prompt_id": [text[start : start + 16] for start in range(0, len(text), 16)]})
    target.commit({part_name(0): target.write_part(part_name(0), table)}, inputs, settings)


def _tell_skipped(sources: tuple[Source, ...]) -> None:
    for source in sources:
        if skipped := skipped_files(source.path):
            logger.warning("%s: %d files are no data and are skipped: %s", source.path, len(skipped), _some(skipped))


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def template_digest(renderer: ChatRenderer) -> str:
    """Returns a digest of how text becomes tokens, independent of a date in the template."""
    tokenizer = renderer.tokenizer
    if "strftime_now" in str(tokenizer.chat_template):
        return digest([tokenizer.chat_template, len(tokenizer), renderer.end_of_turn_id])
    said = f"hm{renderer.template.opening.end}jumps." if renderer.template.opening else "jumps."
    probe = [{"role": "user", "content": "The quick brown fox, 1+1=2."}, {"role": "assistant", "content": said}]
    rendered = renderer.render(probe)
    return digest([tokenizer.chat_template, len(tokenizer), rendered.prompt_ids, rendered.real_ids])


@dataclass(frozen=True, slots=True)
class _Slice:
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


def _rendered(answer: dict[str, Any]) -> _Slice:
    if answer["error"]:
        raise DataError(answer["error"])
    forms, ignored, rows = json.loads(answer["read"])
    ids = np.frombuffer(answer["ids"], dtype=np.uint64)
    first = {form: (where, row) for form, (where, row) in forms.items()}
    return _Slice(answer["name"], ids, first, Counter(ignored), rows)


class _RenderSlice:
    def __init__(self, storage: Storage, stage: str, task: PromptTask) -> None:
        self._storage, self._stage, self._pickled = storage, stage, ray.cloudpickle.dumps(task)

    @property
    def _task(self) -> PromptTask:
        return _unpickled(self._pickled)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Returns a UserError as a value, because Ray keeps only an exception's text."""
        answer = {"name": item["name"], "error": "", "ids": b"", "read": ""}
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
                    unusable.append(_quarantine_row(self._stage, source.origin, found.reason, found.detail, source.raw))
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


def _finish(
    storage: Storage,
    slices: list[_Slice],
    artefact: Artefact,
    firsts: list["_Masks"],
    part_rows: int,
) -> tuple[dict[str, FileEntry], list[Counter[str]]]:
    """Writes the kept rows as parts, and the others to quarantine; returns these parts and each slice's reasons."""
    reasons: list[Counter[str]] = []
    quarantine: list[pa.Table] = []
    entries: dict[str, FileEntry] = {}
    waiting = PROMPT_SCHEMA.empty_table()
    artefact.discard_parts()

    def write(table: pa.Table) -> None:
        if table.num_rows:
            name = part_name(len(entries))
            entries[name] = artefact.write_part(name, table.combine_chunks())

    for name, masks in zip([each.name for each in slices], firsts, strict=True):
        rows = storage.read(f"{name}-rows")
        duplicates = [
            _quarantine_row(artefact.path, row["origin"], reason, detail, row["raw"])
            for reason, detail, which in (
                ("duplicate", "the same prompt and response as an earlier row", masks.repeated),
                (OVERLAP, "the same prompt and response as a row of an earlier source", masks.overlapping),
                (LEAK, "the same prompt and response as a held-out row", masks.held_out),
            )
            for row in (_columns(rows, ["origin", "raw"]).filter(which).to_pylist() if which.any() else [])
        ]
        bad = pa.concat_tables(
            [table_from_bytes(storage.read(f"{name}-bad")), pa.Table.from_pylist(duplicates, QUARANTINE_SCHEMA)]
        )
        reasons.append(Counter(bad["reason"].to_pylist()))
        quarantine.append(bad)
        table = _columns(rows, PROMPT_SCHEMA.names)
        waiting = pa.concat_tables([waiting, table if masks.keep.all() else table.filter(masks.keep)])
        while waiting.num_rows >= part_rows:
            write(waiting.slice(0, part_rows))
            waiting = waiting.slice(part_rows)
    write(waiting)
    storage.replace(f"quarantine/{artefact.path}.parquet", table_to_bytes(pa.concat_tables(quarantine)))
    return entries, reasons


def _columns(part: bytes, names: list[str]) -> pa.Table:
    return pq.read_table(pa.BufferReader(part), columns=names)


class _Masks(NamedTuple):
    """Rows of a slice. All that are in no mask are beyond ``max_rows``."""

    keep: np.ndarray
    repeated: np.ndarray
    """Rows that repeat an earlier one of their source."""
    overlapping: np.ndarray
    """First rows of their kind in their source that repeat one of an earlier source."""
    held_out: np.ndarray


def _first_of_each(
    ids: list[np.ndarray], source_of: Sequence[int], limit: int | None, leaked: np.ndarray | None = None
) -> list[_Masks]:
    """Returns the masks of each slice.

    Args:
        ids: prompt ids by slice.
        source_of: the source's index per slice.
        limit: number of rows to keep; None: all.
        leaked: ids of held-out rows.
    """
    every = np.concatenate(ids)
    held_out = np.zeros(len(every), bool) if leaked is None else np.isin(every, leaked)
    _, first, which = np.unique(every, return_index=True, return_inverse=True)
    is_first = np.zeros(len(every), bool)
    is_first[first] = True
    is_first &= ~held_out
    keep = is_first & (np.cumsum(is_first) <= (len(every) if limit is None else limit))
    repeated = ~is_first & keep[first[which]]
    overlapping = repeated & _first_of_its_source(every, np.repeat(source_of, [len(each) for each in ids]))
    ends = np.cumsum([len(each) for each in ids])[:-1]
    masks = (keep, repeated & ~overlapping, overlapping, held_out)
    return [_Masks(*each) for each in zip(*(np.split(mask, ends) for mask in masks), strict=True)]


def _first_of_its_source(ids: np.ndarray, source: np.ndarray) -> np.ndarray:
    found = np.zeros(len(ids), bool)
    for number in np.unique(source):
        places = np.flatnonzero(source == number)
        found[places[np.unique(ids[places], return_index=True)[1]]] = True
    return found


def _quarantine_row(stage: str, origin: str, reason: str, detail: str, raw: bytes) -> Row:
    detail = detail.encode(errors="backslashreplace").decode()  # Arrow cannot hold lone surrogates
    return {"stage": stage, "origin": origin, "reason": reason, "detail": detail, "row": raw}


@dataclass(frozen=True, slots=True)
class _Quarantined:
    """A source's rows in quarantine, beside all that were read."""

    source: str
    read: int
    """Number of rows in the files."""
    made: int
    """Number of rows made of the usable ones: several of one with ``data.turns: all``."""
    reasons: Counter[str]
    first: int
    """Place of the source's first row in the quarantine's file."""


def _by_source(
    sources: Sequence[Source], source_of: list[int], slices: Sequence[_Slice], reasons: Sequence[Counter[str]]
) -> Iterator[_Quarantined]:
    """Yields the sum of each source's slices."""
    before = 0
    for number, source in enumerate(sources):
        own = [place for place, its in enumerate(source_of) if its == number]
        read, made = sum(slices[place].read for place in own), sum(len(slices[place].ids) for place in own)
        found = sum((reasons[place] for place in own), Counter[str]())
        yield _Quarantined(source.path, read, made, found, before)
        before += found.total()


def _check_quarantine(run_dir: RunDir, config: SpinConfig, artefact: Artefact, found: _Quarantined) -> None:
    """Compares unusable rows with all rows of a source, whatever ``max_rows`` or the source's share takes of them."""
    source, reasons = found.source, found.reasons
    if leaks := reasons[LEAK]:
        logger.warning("%s: %d rows are held out, too, and are not trained on (data.keep_leaks)", source, leaks)
    if overlaps := reasons[OVERLAP]:
        logger.warning("%s: %d rows are in an earlier source, too, and are taken from that one", source, overlaps)
    unusable = Counter({reason: count for reason, count in reasons.items() if reason not in _ELSEWHERE})
    refused = unusable.total() - unusable["duplicate"]
    rows_of_each = found.made / max(found.read - refused, 1)
    every = found.read - int((leaks + overlaps) / rows_of_each) if leaks + overlaps else found.read
    bad = refused + ceil(unusable["duplicate"] / rows_of_each) if unusable["duplicate"] else refused
    if found.made > leaks and bad <= config.data.max_quarantine_fraction * every:
        if bad:
            logger.warning("%s: %d of %d rows in quarantine (%s)", source, bad, every, _counts(unusable))
        return
    where = f"quarantine/{artefact.path}.parquet"
    if not bad:
        raise DataError(f"{source}: {ALL_HELD_OUT if leaks else 'holds no rows'}")
    rows = table_from_bytes(run_dir.storage.read(where)).slice(found.first, reasons.total()).to_pylist()
    first = next(row for row in rows if row["reason"] not in _ELSEWHERE)
    raise DataError(
        f"{source}: {bad} of {every} rows cannot be used ({_counts(unusable)}), "
        f"more than data.max_quarantine_fraction {config.data.max_quarantine_fraction:g}; "
        f"first: {first['origin']}: {first['reason']}: {first['detail']}; "
        f"all are in {run_dir.storage.where(where)}"
    )


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
