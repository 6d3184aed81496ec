"""Prompt rows, rendered and tokenised from slices of the data, one Ray task per slice.

Duplicates and unusable rows go to RUN/quarantine with the reason.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.exceptions

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.config.sections import Source, Train, name_of, sources_of
from spin_ray.errors import DataError, StageError, last_line, memory_advice
from spin_ray.inputs.forms import refuse_two_forms
from spin_ray.inputs.held_out import none_held_out
from spin_ray.inputs.mixture import draw, warn_of_limit
from spin_ray.inputs.prompt_rows import PromptTask
from spin_ray.inputs.rendering import ChatRenderer
from spin_ray.inputs.sources import Slice, files_digest, find_files, skipped_files, split
from spin_ray.inputs.survey import NONE_TRAINED
from spin_ray.loop.stages.prompts.quarantine import (
    DUPLICATE,
    LEAK,
    OVERLAP,
    QUARANTINE_SCHEMA,
    Quarantined,
    check_source,
    quarantine_row,
)
from spin_ray.loop.stages.prompts.selection import Masks, first_of_each
from spin_ray.loop.stages.prompts.slices import TRIES, RenderedSlice, RenderSlice
from spin_ray.run_dir.artefact import Artefact, FileEntry
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PROMPT_SCHEMA
from spin_ray.run_dir.storage import ATTEMPTS, Storage, table_from_bytes, table_to_bytes
from spin_ray.runtime.actors import map_by_tasks
from spin_ray.runtime.waiting import with_deadline

logger = logging.getLogger(__name__)

_KEPT = "rows are held out, too, and are trained on (data.keep_leaks): evaluations on them say little"
_DIVIDED = (
    "rows to train on are parts of held-out conversations (conversation_id), so evaluations on these are too good; "
    "hold whole conversations out by data.heldout"
)


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
        slices = _render(pieces, folder, RenderSlice(run_dir.storage, artefact.path, task), source)
        if task.part == "held out" and not any(each.read for each in slices):
            raise none_held_out(config.data.heldout_fraction or 0, source)
        _refuse_mixed_files(slices, [piece.uri for piece in pieces])
        if ignored := sum((each.ignored for each in slices), Counter[str]()):
            logger.warning("%s: not read: %s", source, ", ".join(f"{n} in {k} rows" for n, k in ignored.most_common()))
        held_out = _ids_of(rows.without)
        leaked = None if config.data.keep_leaks else held_out
        firsts = first_of_each([each.ids for each in slices], source_of, rows.max_rows, leaked)
        if is_drawn:
            counted["sources"] = _draw(firsts, sources, source_of, config.seed, rows.setting)
        if rows.every_id is not None:
            _commit_ids(rows.every_id, slices, firsts, inputs, settings)
        if held_out is not None:
            _warn_of_known(run_dir, artefact, slices, firsts, source, held_out)
        entries, reasons = _finish(run_dir.storage, slices, artefact, firsts, settings["part_rows"])
        quarantined = sum(reasons, Counter[str]())
        counted |= {"rows": sum(entry.rows or 0 for entry in entries.values()), "quarantined": quarantined.total()}
        if task.part != "held out" or not any(len(each.ids) for each in slices):  # its sources are judged in training
            for read in _by_source(sources, source_of, slices, reasons):
                if task.part == "trained" and not read.read:
                    raise DataError(f"{read.source}: {NONE_TRAINED}")
                if task.part is None or read.read:
                    check_source(read, artefact, config.data.max_quarantine_fraction)
        artefact.commit(entries, inputs, settings, counts=dict(quarantined))
        run_dir.storage.delete(folder)


def _render(pieces: Sequence[Slice], folder: str, render: RenderSlice, source: str) -> list[RenderedSlice]:
    """Renders slices in Ray tasks and keeps their order. A task has a CPU, as each process imports for seconds."""
    items = [asdict(piece) | {"name": f"{folder}/{index:06d}"} for index, piece in enumerate(pieces)]
    rendered = map_by_tasks(items, render, retries=TRIES)
    try:
        found = with_deadline(rendered.iter_rows(), 3600, 3600, "a slice of the data")
        return sorted((RenderedSlice.of(row) for row in found), key=lambda slice_: slice_.name)
    except ray.exceptions.RayError as error:
        advice = memory_advice(error, "free memory on the machines that render rows")
        raise StageError(f"{source}: cannot be rendered: {last_line(error)}{advice}; run the command again") from error


def _refuse_mixed_files(slices: list[RenderedSlice], uris: list[str]) -> None:
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


def _warn_of_known(
    run_dir: RunDir, artefact: Artefact, slices: list[RenderedSlice], firsts: list[Masks], source: str, ids: np.ndarray
) -> None:
    """Warns of rows to train on that are held out, too, or parts of held-out conversations.

    Args:
        ids: uint64 [held-out rows].
    """
    kept = sum(int((np.isin(each.ids, ids) & masks.keep).sum()) for each, masks in zip(slices, firsts, strict=True))
    if kept:
        run_dir.warn(artefact.path, f"{source}: {kept} {_KEPT}")
    held_out = {each for table in run_dir.heldout.tables() for each in table["conversation_id"].unique().to_pylist()}
    if not (names := held_out - {None}):
        return
    divided = 0
    for each, masks in zip(slices, firsts, strict=True):
        of = _columns(run_dir.storage.read(f"{each.name}-rows"), ["conversation_id"])["conversation_id"]
        is_known = pc.is_in(of, value_set=pa.array(names, pa.string())).to_numpy() & masks.keep
        divided += int((is_known & ~np.isin(each.ids, ids)).sum())
    if divided:
        run_dir.warn(artefact.path, f"{source}: {divided} {_DIVIDED}")


def _draw(
    firsts: list[Masks], sources: tuple[Source, ...], source_of: list[int], seed: int, setting: str
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
    target: Artefact, slices: list[RenderedSlice], firsts: list[Masks], inputs: dict[str, str], settings: dict[str, Any]
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def template_digest(renderer: ChatRenderer) -> str:
    """Returns a digest of how text becomes tokens, independent of a date in the template."""
    tokenizer = renderer.tokenizer
    if "strftime_now" in str(tokenizer.chat_template):
        return digest([tokenizer.chat_template, len(tokenizer), renderer.end_of_turn_id])
    said = f"hm{renderer.template.opening.end}jumps." if renderer.template.opening else "jumps."
    probe = [{"role": "user", "content": "The quick brown fox, 1+1=2."}, {"role": "assistant", "content": said}]
    rendered = renderer.render(probe)
    return digest([tokenizer.chat_template, len(tokenizer), rendered.prompt_ids, rendered.real_ids])


def _finish(
    storage: Storage,
    slices: list[RenderedSlice],
    artefact: Artefact,
    firsts: list[Masks],
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
            quarantine_row(artefact.path, row["origin"], reason, detail, row["raw"])
            for reason, detail, which in (
                (DUPLICATE, "the same prompt and response as an earlier row", masks.repeated),
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


def _by_source(
    sources: Sequence[Source], source_of: list[int], slices: Sequence[RenderedSlice], reasons: Sequence[Counter[str]]
) -> Iterator[Quarantined]:
    """Yields the sum of each source's slices."""
    before = 0
    for number, source in enumerate(sources):
        own = [place for place, its in enumerate(source_of) if its == number]
        read, made = sum(slices[place].read for place in own), sum(len(slices[place].ids) for place in own)
        found = sum((reasons[place] for place in own), Counter[str]())
        yield Quarantined(source.path, read, made, found, before)
        before += found.total()
