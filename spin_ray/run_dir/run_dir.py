"""A run on disk: where artefacts are, and when they count.

RUN/run.json                     what the run is: resolved config, versions, digests
RUN/<artefact>/part-*.parquet    rows
RUN/<artefact>/_MANIFEST.json    the commit: readers trust only what it lists
RUN/events.jsonl, RUN/LATEST     what happened; the newest published iterate
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import BaseModel

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir.cache import without_weights
from spin_ray.run_dir.storage import (
    ATTEMPTS,
    Digest,
    Storage,
    bytes_digest,
    file_digest,
    table_from_bytes,
    table_to_bytes,
)

logger = logging.getLogger(__name__)

MANIFEST = "_MANIFEST.json"
CARD = "README.md"
"""Of a model; no part of it."""


class FileEntry(BaseModel):
    sha256: str
    bytes: int
    rows: int | None = None


class Manifest(BaseModel):
    """What an artefact consists of and what it was made from."""

    files: dict[str, FileEntry]
    inputs: dict[str, str]
    """Digests of the artefacts and models it was made from."""
    config: str
    """Digest of ``settings``."""
    settings: dict[str, Any]
    """The part of the config that decides the content."""
    counts: dict[str, float] = {}
    """What the stage counted, e.g. dropped pairs."""

    @classmethod
    def of(
        cls,
        files: dict[str, FileEntry],
        inputs: dict[str, str],
        settings: dict[str, Any],
        counts: dict[str, float] | None = None,
    ) -> Self:
        """The manifest of these files; ``settings`` as they come back from disk."""
        settings = _as_json(settings)
        return cls(files=files, inputs=inputs, config=digest(settings), settings=settings, counts=counts or {})

    def to_bytes(self) -> bytes:
        """What is written: the content and, as nothing else vouches for a manifest, its digest."""
        return _json_bytes(self.model_dump() | {"digest": self.digest})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError if the bytes are damaged."""
        content = json.loads(data)
        digest = content.pop("digest", None)  # the first manifests had none
        manifest = cls.model_validate(content)
        if digest is not None and manifest.digest != digest:
            raise ValueError("differs from its digest")
        return manifest

    @property
    def digest(self) -> str:
        return bytes_digest(_json_bytes(self.model_dump())).sha256

    @property
    def rows(self) -> int:
        return sum(entry.rows or 0 for entry in self.files.values())


@dataclass(frozen=True)
class Artefact:
    """A folder of the run with the commit protocol: parts first, each created atomically; the manifest last."""

    storage: Storage
    path: str
    """Below the run, e.g. ``iter_000/pairs``."""

    @property
    def is_committed(self) -> bool:
        return self.storage.exists(f"{self.path}/{MANIFEST}")

    def manifest(self) -> Manifest:
        """Raises RunDirError if the artefact is not committed or its manifest is damaged."""
        try:
            return Manifest.from_bytes(self.storage.read(f"{self.path}/{MANIFEST}"))
        except FileNotFoundError as error:
            raise RunDirError(f"{self.storage.where(self.path)}: is not committed; run the command again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirError(
                f"{self.storage.where(self.path)}/{MANIFEST}: is damaged; restore it or remove the folder"
            ) from error

    def is_current(self, inputs: dict[str, str], settings: dict[str, Any]) -> bool:
        """True if the artefact is committed and was made from these inputs and settings; False if it is not committed.

        Raises:
            RunDirError: it was made from others; the message names what differs.
        """
        if not self.is_committed:
            return False
        manifest = self.manifest()
        differing = sorted(
            key
            for then, now in ((manifest.settings, _as_json(settings)), (manifest.inputs, inputs))
            for key in then.keys() | now.keys()
            if then.get(key) != now.get(key)
        )
        if differing:
            raise RunDirError(
                f"{self.storage.where(self.path)}: was made with other values of {', '.join(differing)}; "
                "restore them, choose another --out, or remove this folder and those of later iterations"
            )
        return True

    def write_part(self, name: str, table: pa.Table) -> FileEntry:
        """Commits one part. A part that is there already stays as it is: the first commit wins."""
        data = table_to_bytes(table)
        try:
            self.storage.create(f"{self.path}/{name}", data)
        except FileExistsError:
            return self.part_entry(name)
        sha256, size = bytes_digest(data)
        return FileEntry(sha256=sha256, bytes=size, rows=table.num_rows)

    def replace_part(self, name: str, table: pa.Table) -> FileEntry:
        """Commits one part in place of what an attempt that never reached its manifest may have left under its name."""
        self.storage.delete(f"{self.path}/{name}")
        return self.write_part(name, table)

    def discard_parts(self) -> None:
        """Removes the parts of an attempt that never reached its manifest."""
        for name in self.part_names():
            self.storage.delete(f"{self.path}/{name}")

    def open_part(self, name: str) -> tuple[pa.Table, FileEntry]:
        """Rows of a part that no manifest lists yet, and the entry that it would have there.

        Raises:
            RunDirError: it is no Parquet file.
        """
        data = self.storage.read(f"{self.path}/{name}")
        try:
            table = table_from_bytes(data)
        except (pa.ArrowException, OSError) as error:
            raise RunDirError(f"{self.storage.where(self.path)}/{name}: is damaged; remove it to redo it") from error
        sha256, size = bytes_digest(data)
        return table, FileEntry(sha256=sha256, bytes=size, rows=table.num_rows)

    def part_entry(self, name: str) -> FileEntry:
        return self.open_part(name)[1]

    def part_names(self) -> list[str]:
        """Parts that are there, whether the artefact as a whole is committed or not."""
        return [name for name in self.storage.names(self.path) if name.startswith("part-")]

    def commit(
        self,
        files: dict[str, FileEntry],
        inputs: dict[str, str],
        settings: dict[str, Any],
        counts: dict[str, float] | None = None,
    ) -> Manifest:
        """Makes the artefact count: from here on its bytes never change."""
        manifest = Manifest.of(files, inputs, settings, counts)
        try:
            self.storage.create(f"{self.path}/{MANIFEST}", manifest.to_bytes())
        except FileExistsError:
            self.is_current(inputs, settings)
            return self.manifest()
        return manifest

    def read_part(self, name: str, entry: FileEntry) -> pa.Table:
        """Rows of one part, after checking its digest."""
        where = f"{self.path}/{name}"
        try:
            data = self.storage.read(where)
        except FileNotFoundError as error:
            raise RunDirError(f"{self.storage.where(where)}: is missing though its manifest lists it") from error
        if bytes_digest(data) != (entry.sha256, entry.bytes):
            raise RunDirError(
                f"{self.storage.where(where)}: differs from its digest; restore it or remove {self.path} to redo it"
            )
        return table_from_bytes(data)

    def tables(self) -> Iterator[pa.Table]:
        """The parts in order, one at a time."""
        for name, entry in sorted(self.manifest().files.items()):
            yield self.read_part(name, entry)

    def local_folder(self, *, weights: bool = True) -> Path:
        """The files on this machine, e.g. of a model, with or without its weights."""
        files = {name: Digest(entry.sha256, entry.bytes) for name, entry in self.manifest().files.items()}
        return self.storage.local_folder(self.path, files if weights else without_weights(files))

    def verify(self) -> Manifest:
        """Recomputes every digest.

        Raises:
            RunDirError: a file is missing or differs from the manifest.
        """
        manifest = self.manifest()
        for name, entry in manifest.files.items():
            where = f"{self.path}/{name}"
            if not self.storage.exists(where) or self.storage.digest(where) != (entry.sha256, entry.bytes):
                raise RunDirError(
                    f"{self.storage.where(where)}: is missing or differs from its digest; "
                    f"restore it or remove {self.path}"
                )
        return manifest


class RunDir:
    """Names of everything in a run, its identity, its log and LATEST."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def artefact(self, path: str) -> Artefact:
        return Artefact(self.storage, path)

    @property
    def prompts(self) -> Artefact:
        return self.artefact("prompts")

    @property
    def questions(self) -> Artefact:
        """Unlabelled questions, in the form of prompts without a real response."""
        return self.artefact("questions")

    @property
    def heldout(self) -> Artefact:
        return self.artefact("heldout")

    def generations(self, iteration: int) -> Artefact:
        return self.artefact(f"{iteration_name(iteration)}/generations")

    def pairs(self, iteration: int) -> Artefact:
        return self.artefact(f"{iteration_name(iteration)}/pairs")

    def reference(self, iteration: int) -> Artefact:
        return self.artefact(f"{iteration_name(iteration)}/reference")

    def base_scores(self, iteration: int) -> Artefact:
        """log p of the pairs under θ_0, the other part of a geometric reference; iteration 0 needs none."""
        return self.artefact(f"{iteration_name(iteration)}/base_scores")

    def preferences(self, iteration: int) -> Artefact:
        """Win probabilities of single responses, by SPPO's judge."""
        return self.artefact(f"{iteration_name(iteration)}/preferences")

    def wins(self, iteration: int) -> Artefact:
        """The same of the pairs that were made of them."""
        return self.artefact(f"{iteration_name(iteration)}/wins")

    def model(self, iterate: int) -> Artefact:
        """Weights of θ_iterate; θ_0 is there only if the warm-up ran."""
        return self.artefact(f"{iterate_name(iterate)}/model")

    def heldout_samples(self, iterate: int) -> Artefact:
        """Answers of θ_iterate to the held-out prompts."""
        return self.artefact(f"{iterate_name(iterate)}/heldout_samples")

    def eval_path(self, iterate: int) -> str:
        return f"{iterate_name(iterate)}/eval.json"

    def begin(self, config: SpinConfig, facts: dict[str, Any]) -> None:
        """Writes run.json, or checks that the run there is this one.

        ``train.precision: auto`` means the precision that the run began with, and run.json keeps that one.

        Raises:
            RunDirError: the folder holds another run (the message names the differing keys) or something else.
        """
        if self.storage.exists("run.json"):
            config = config.take_precision_of(self.config())
            self._check_identity(config, facts)
        elif foreign := [name for name in self.storage.entries() if not name.startswith((".", "lease.json"))]:
            raise RunDirError(
                f"{self.storage.root}: is not a run and not empty (holds {foreign[0]}); choose another --out"
            )
        self.storage.delete(ATTEMPTS)
        content = {"config": config.model_dump(mode="json"), **facts}
        self.storage.replace("run.json", json.dumps(content, indent=1).encode())

    def _check_identity(self, config: SpinConfig, facts: dict[str, Any]) -> None:
        stored = self.description()
        then = self.config().take_precision_of(config).identity() | stored["inputs"]
        now = config.identity() | facts["inputs"]
        differing = [
            f"{key} (was {then.get(key)!r}, now {now.get(key)!r})"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if differing:
            raise RunDirError(
                f"{self.storage.root}: holds another run: {'; '.join(differing)}; restore these or choose another --out"
            )

    def config(self) -> SpinConfig:
        """The config in run.json; a ConfigError names what this version of spin_ray does not know of it."""
        return parse_config(self.description()["config"], source=f"{self.storage.root}/run.json")

    def description(self) -> dict[str, Any]:
        """run.json."""
        try:
            return json.loads(self.storage.read("run.json"))
        except FileNotFoundError as error:
            raise RunDirError(f"{self.storage.root}: is not a run (no run.json)") from error
        except ValueError as error:
            raise RunDirError(f"{self.storage.root}/run.json: is damaged; restore it") from error

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Logs start, then commit or failure with wall time; the body adds what it counted to the yielded dict.

        ``tokens`` become ``tokens_per_s`` of wall time. ``work_s``, the seconds of generating, scoring and stepping
        (mean over replicas), becomes ``useful``, their share of wall time: the rest is starting, loading, writing.
        """
        counted: dict[str, Any] = {}
        self.event("start", name)
        started = time.monotonic()
        try:
            yield counted
        except BaseException as error:
            with suppress(StageError, RunDirError):  # a log that cannot be written must not hide why the stage failed
                self.event(
                    "failure",
                    name,
                    seconds=round(time.monotonic() - started, 3),
                    error=f"{type(error).__name__}: {error}"[:500],
                )
            raise
        seconds = time.monotonic() - started
        if "tokens" in counted:
            counted["tokens_per_s"] = round(counted["tokens"] / seconds, 1)
        if "work_s" in counted:
            counted["useful"] = round(counted.pop("work_s") / seconds, 3)
            logger.info("%s: %.0f s, %.0f %% of it useful work", name, seconds, 100 * counted["useful"])
        self.event("commit", name, seconds=round(seconds, 3), **counted)

    def was_cut_off(self, stage: str) -> bool:
        """Whether the last attempt at a stage began and did not commit: what it had in hand was lost."""
        told = [event["event"] for event in self.events() if event["stage"] == stage and event["event"] != "lost"]
        return bool(told) and told[-1] != "commit"

    def event(self, event: str, stage: str, **values: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event, "stage": stage, **values}
        self.storage.append("events.jsonl", json.dumps(line) + "\n")

    def events(self) -> list[dict[str, Any]]:
        return read_json_lines(self.storage, "events.jsonl")

    def publish(self, iterate: int) -> None:
        """Moves LATEST on to θ_iterate; never back, as a resumed driver passes the earlier iterates again."""
        latest = self.latest()
        if latest is None or iterate > iterate_number(latest):
            self.storage.replace("LATEST", f"{iterate_name(iterate)}\n".encode())
            self.event("publish", iterate_name(iterate))

    def latest(self) -> str | None:
        """The newest published iterate. A damaged LATEST counts as none: the next driver writes it anew."""
        try:
            name = self.storage.read("LATEST").decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        if re.fullmatch(r"sft|iter_\d{3,}", name):
            return name
        logger.warning("%s/LATEST: is damaged (holds %r); run the command again to mend it", self.storage.root, name)
        return None


def part_name(number: int) -> str:
    """``7 -> part-00007.parquet``."""
    return f"part-{number:05d}.parquet"


def iteration_name(iteration: int) -> str:
    """``0 -> iter_000``: the first SPIN iteration."""
    return f"iter_{iteration:03d}"


def iterate_name(iterate: int) -> str:
    """``0 -> sft`` (θ_0), ``1 -> iter_000``: iteration t turns θ_t into θ_{t+1} and keeps it in its own folder."""
    return "sft" if iterate == 0 else iteration_name(iterate - 1)


def iterate_number(name: str) -> int:
    """``sft -> 0``, ``iter_000 -> 1``: the inverse of ``iterate_name``."""
    return 0 if name == "sft" else int(name.removeprefix("iter_")) + 1


def read_json_lines(storage: Storage, name: str) -> list[dict[str, Any]]:
    """Complete lines of a log; a line that a crash cut short is left out."""
    try:
        text = storage.read(name).decode()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


def folder_entries(folder: Path) -> dict[str, FileEntry]:
    """Every file below ``folder`` with its digest, but for what is said about it: manifest and card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, CARD))
    entries = {}
    for path in files:
        sha256, size = file_digest(path)
        entries[path.relative_to(folder).as_posix()] = FileEntry(sha256=sha256, bytes=size)
    return entries


def folder_digest(files: dict[str, FileEntry]) -> str:
    """One digest for a set of files."""
    lines = "".join(f"{entry.sha256} {name}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from disk (tuples become lists)."""
    return json.loads(json.dumps(settings))
