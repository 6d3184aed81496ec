"""Stage 1: SFT data -> Prompt rows. The only stage that renders and tokenises.

    files -> slices -> [one task a slice: parse, check, render, tokenise] -> drop duplicates, cut into parts

Rows that cannot be used go to RUN/quarantine with the reason, and are counted.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray

from spin_ray.config import DataConfig, SpinConfig, digest
from spin_ray.errors import DataError
from spin_ray.rendering import ChatRenderer, Message, RenderError, load_tokenizer
from spin_ray.resources import with_deadline
from spin_ray.run_dir import Artefact, FileEntry, RunDir, part_name
from spin_ray.sources import Slice, SourceRow, files_digest, find_files, read_slice, split
from spin_ray.storage import ATTEMPTS, Storage, table_from_bytes, table_to_bytes
from spin_ray.types import PROMPT_SCHEMA

logger = logging.getLogger(__name__)

QUARANTINE_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("stage", "origin", "reason", "detail")] + [pa.field("row", pa.binary())]
)
_ORIGIN = pa.field("origin", pa.string())
_RAW = pa.field("raw", pa.binary())


@dataclass(frozen=True)
class PromptTask:
    """What a task needs to turn a slice into rows."""

    tokenizer: str
    chat_template: str | None
    trust_remote_code: bool
    max_length: int
    data: DataConfig

    @cached_property
    def renderer(self) -> ChatRenderer:
        return ChatRenderer(load_tokenizer(self.tokenizer, self.chat_template, self.trust_remote_code))


def run(
    run_dir: RunDir, config: SpinConfig, artefact: Artefact, source: str, tokenizer: str, max_rows: int | None
) -> None:
    """Makes ``artefact`` (prompts or heldout) of the rows of ``source``.

    Raises:
        DataError: the data is missing or empty, or too many rows cannot be used.
    """
    files = find_files(source)
    task = PromptTask(
        tokenizer=tokenizer,
        chat_template=config.model.chat_template,
        trust_remote_code=config.model.trust_remote_code,
        max_length=config.model.max_length,
        data=config.data,
    )
    inputs = {"data": files_digest(files), "chat_template": template_digest(task.renderer)}
    settings = {
        "max_length": config.model.max_length,
        "turns": config.data.turns,
        "system": config.data.system,
        "max_rows": max_rows,
        "part_rows": config.generation.shard_rows,
    }
    if artefact.is_current(inputs, settings):
        return
    with run_dir.stage(artefact.path) as counted:
        slices = split(files)
        folder = f"{ATTEMPTS}/{artefact.path}-{digest([inputs, settings])[:16]}"
        items = [asdict(piece) | {"name": f"{folder}/{index:06d}"} for index, piece in enumerate(slices)]
        rendered = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _RenderSlice(run_dir.storage, artefact.path, task), num_cpus=0.5
        )
        names = sorted(row["name"] for row in with_deadline(rendered.iter_rows(), 3600, 3600, "a slice of the data"))
        entries, quarantined = _finish(run_dir.storage, names, artefact, max_rows, settings["part_rows"])
        counted |= {"rows": sum(entry.rows or 0 for entry in entries.values()), "quarantined": quarantined.total()}
        _check_quarantine(run_dir, config, artefact, source, counted["rows"], quarantined)
        artefact.commit(entries, inputs, settings, counts=dict(quarantined))
        run_dir.storage.delete(folder)


def template_digest(renderer: ChatRenderer) -> str:
    """Names how text becomes tokens: template, vocabulary and end-of-turn token."""
    tokenizer = renderer._tokenizer
    probe = [{"role": "user", "content": "The quick brown fox, 1+1=2."}, {"role": "assistant", "content": "jumps."}]
    rendered = renderer.render(probe)
    return digest([tokenizer.chat_template, len(tokenizer), rendered.prompt_ids, rendered.real_ids])


class _RenderSlice:
    """One task: reads a slice and writes its rows, good and bad, to an unnamed part."""

    def __init__(self, storage: Storage, stage: str, task: PromptTask) -> None:
        self._storage, self._stage, self._task = storage, stage, task

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        name = item["name"]
        piece = Slice(item["uri"], item["start"], item["stop"])
        rows: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for source in read_slice(piece):
            try:
                rows += [row | {"origin": source.origin, "raw": source.raw} for row in _rows_of(source, self._task)]
            except _Unusable as unusable:
                bad.append(_quarantine_row(self._stage, source.origin, unusable.reason, unusable.detail, source.raw))
        schema = PROMPT_SCHEMA.append(_ORIGIN).append(_RAW)
        self._storage.replace(f"{name}-rows", table_to_bytes(pa.Table.from_pylist(rows, schema)))
        self._storage.replace(f"{name}-bad", table_to_bytes(pa.Table.from_pylist(bad, QUARANTINE_SCHEMA)))
        return {"name": name}


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def _rows_of(source: SourceRow, task: PromptTask) -> list[dict[str, Any]]:
    """Prompt rows of one source row: one, or one per assistant turn."""
    if source.content is None:
        raise _Unusable("malformed", "not a JSON object")
    messages = _messages_of(source.content, task.data)
    answer = _answer_of(source.content.get("answer"))
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {"first": ends[:1], "last": ends[-1:], "all": ends}[task.data.turns]
    rows = []
    for end in wanted:
        conversation = messages[: end + 1]
        if not conversation[-1]["content"].strip():
            raise _Unusable("empty", f"message {end} (assistant) has no text")
        try:
            rendered = task.renderer.render(conversation)
        except RenderError as error:
            raise _Unusable("template", f"the chat template refuses it: {error}") from error
        length = len(rendered.prompt_ids) + len(rendered.real_ids)
        if length > task.max_length:
            raise _Unusable("too_long", f"{length} tokens, model.max_length is {task.max_length}")
        identity = json.dumps([rendered.prompt_ids, rendered.real_ids]).encode()
        rows.append(
            {
                "prompt_id": hashlib.blake2b(identity, digest_size=8).hexdigest(),
                "prompt_ids": rendered.prompt_ids,
                "real_ids": rendered.real_ids,
                "messages": json.dumps(conversation, ensure_ascii=False),
                "answer": answer,
            }
        )
    return rows


def _messages_of(content: dict[str, Any], data: DataConfig) -> list[Message]:
    """The conversation of a row in either form, checked."""
    messages = content.get("messages")
    if messages is None:
        if "prompt" not in content or "response" not in content:
            raise _Unusable("malformed", "needs messages, or prompt and response")
        messages = [
            {"role": "user", "content": content["prompt"]},
            {"role": "assistant", "content": content["response"]},
        ]
    if not isinstance(messages, list):
        raise _Unusable("malformed", f"messages: expected a list, found {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise _Unusable("malformed", f"message {index}: needs a role of system, user or assistant")
        text = message.get("content")
        if not isinstance(text, str):
            raise _Unusable("malformed", f"message {index}: content must be text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Unusable("malformed", f"message {index}: content is not valid Unicode (a lone surrogate)") from None
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise _Unusable("empty", "no assistant message")
    if messages[0]["role"] == "assistant":
        raise _Unusable("empty", "starts with the assistant: there is no prompt")
    if data.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data.system})
    return messages


def _answer_of(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _finish(
    storage: Storage, names: list[str], artefact: Artefact, max_rows: int | None, part_rows: int
) -> tuple[dict[str, FileEntry], Counter[str]]:
    """Drops duplicates, cuts rows into parts of ``part_rows``, writes the quarantine; one slice in memory at a time."""
    seen: set[str] = set()
    reasons: Counter[str] = Counter()
    quarantine: list[pa.Table] = []
    entries: dict[str, FileEntry] = {}
    waiting = PROMPT_SCHEMA.empty_table()
    artefact.discard_parts()

    def write(table: pa.Table) -> None:
        if table.num_rows:
            name = part_name(len(entries))
            entries[name] = artefact.write_part(name, table.combine_chunks())

    for name in names:
        table = table_from_bytes(storage.read(f"{name}-rows"))
        keep, repeated = _first_of_each(table["prompt_id"].to_pylist(), seen, max_rows)
        duplicates = [
            _quarantine_row(
                artefact.path, row["origin"], "duplicate", "the same prompt and response as an earlier row", row["raw"]
            )
            for row in table.take(pa.array(repeated, pa.int64())).to_pylist()
        ]
        bad = table_from_bytes(storage.read(f"{name}-bad")).to_pylist() + duplicates
        reasons.update(row["reason"] for row in bad)
        quarantine.append(pa.Table.from_pylist(bad, QUARANTINE_SCHEMA))
        waiting = pa.concat_tables([waiting, table.take(pa.array(keep, pa.int64())).select(PROMPT_SCHEMA.names)])
        while waiting.num_rows >= part_rows:
            write(waiting.slice(0, part_rows))
            waiting = waiting.slice(part_rows)
    write(waiting)
    storage.replace(f"quarantine/{artefact.path}.parquet", table_to_bytes(pa.concat_tables(quarantine)))
    return entries, reasons


def _first_of_each(ids: list[str], seen: set[str], limit: int | None) -> tuple[list[int], list[int]]:
    """Row numbers to keep, at most ``limit`` over all calls, and those whose id came before; ``seen`` remembers ids."""
    keep, repeated = [], []
    for number, prompt_id in enumerate(ids):
        if prompt_id in seen:
            repeated.append(number)
        elif limit is None or len(seen) < limit:
            seen.add(prompt_id)
            keep.append(number)
    return keep, repeated


def _quarantine_row(stage: str, origin: str, reason: str, detail: str, raw: bytes) -> dict[str, Any]:
    return {"stage": stage, "origin": origin, "reason": reason, "detail": detail, "row": raw}


def _check_quarantine(
    run_dir: RunDir, config: SpinConfig, artefact: Artefact, source: str, good: int, reasons: Counter[str]
) -> None:
    bad = reasons.total()
    if good and bad <= config.data.max_quarantine_fraction * (good + bad):
        if bad:
            logger.warning("%s: %d of %d rows in quarantine (%s)", source, bad, good + bad, _counts(reasons))
        return
    where = f"quarantine/{artefact.path}.parquet"
    if not bad:
        raise DataError(f"{source}: holds no rows")
    first = table_from_bytes(run_dir.storage.read(where)).slice(0, 1).to_pylist()[0]
    raise DataError(
        f"{source}: {bad} of {good + bad} rows cannot be used ({_counts(reasons)}), "
        f"more than data.max_quarantine_fraction {config.data.max_quarantine_fraction:g}; "
        f"first: {first['origin']}: {first['reason']}: {first['detail']}; "
        f"all are in {run_dir.storage.path(where)}"
    )


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
