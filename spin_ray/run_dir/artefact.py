"""Artefacts of a run: atomically created parts, then the manifest that commits them."""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import BaseModel

from spin_ray.config.recipe import digest, flatten
from spin_ray.errors import NotCommittedError, RunDirError, was_and_now
from spin_ray.run_dir.cache import without_weights
from spin_ray.run_dir.storage import (
    MANIFEST,
    Digest,
    Storage,
    bytes_digest,
    file_digest,
    table_from_bytes,
    table_to_bytes,
)

CARD = "README.md"
"""Model card; not part of the artefact."""
FINGERPRINT = b"spin_ray.fingerprint"
"""Parquet metadata of a sealed part: digest of its inputs and settings."""
CHECKSUM = b"spin_ray.checksum"
"""Parquet metadata of a sealed part: digest of its rows and fingerprint."""

logger = logging.getLogger(__name__)


class FileEntry(BaseModel):
    sha256: str
    bytes: int
    rows: int | None = None


class Manifest(BaseModel):
    """Files of an artefact, and their origin."""

    files: dict[str, FileEntry]
    inputs: dict[str, str]
    """Digests of the artefacts and models used."""
    settings: dict[str, Any]
    """Config values that determine the content."""
    counts: dict[str, float] = {}

    @classmethod
    def of(
        cls,
        files: dict[str, FileEntry],
        inputs: dict[str, str],
        settings: dict[str, Any],
        counts: dict[str, float] | None = None,
    ) -> Self:
        return cls(files=files, inputs=inputs, settings=as_json(settings), counts=counts or {})

    def to_bytes(self) -> bytes:
        return _json_bytes(self.model_dump() | {"digest": self.digest})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a manifest.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the bytes are damaged.
        """
        content = json.loads(data)
        digest = content.pop("digest")
        manifest = cls.model_validate(content)
        if manifest.digest != digest:
            raise ValueError("differs from its digest")
        return manifest

    @property
    def digest(self) -> str:
        return bytes_digest(_json_bytes(self.model_dump())).sha256

    @property
    def rows(self) -> int:
        return sum(entry.rows or 0 for entry in self.files.values())


@dataclass(frozen=True)
class FoundParts:
    """Sealed parts of an uncommitted artefact."""

    whole: dict[str, FileEntry]
    missing: list[str]
    """Expected parts still to be made, in order."""
    damaged: int


@dataclass(frozen=True)
class Artefact:
    """A folder of the run, committed once its manifest exists."""

    storage: Storage
    path: str
    """Folder relative to the run, e.g. ``iter_000/pairs``."""

    @property
    def is_committed(self) -> bool:
        return self.storage.exists(f"{self.path}/{MANIFEST}")

    def manifest(self) -> Manifest:
        """Reads the manifest.

        Raises:
            RunDirError: the manifest is missing or damaged.
        """
        try:
            return Manifest.from_bytes(self.storage.read(f"{self.path}/{MANIFEST}"))
        except FileNotFoundError as error:
            self.storage.refuse_gone()
            where = self.storage.where(self.path)
            raise NotCommittedError(f"{where}: is not committed; run the command again", self.path) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirError(
                f"{self.storage.where(self.path)}/{MANIFEST}: is damaged; restore it or remove the folder"
            ) from error

    def already_made(self, inputs: dict[str, str], settings: dict[str, Any]) -> bool:
        """Tells whether the artefact is committed.

        Raises:
            RunDirError: committed with other inputs or settings.
        """
        if not self.is_committed:
            return False
        manifest = self.manifest()
        differing = changes(manifest.settings, as_json(settings)) + _differing(manifest.inputs, inputs)
        if differing:
            raise RunDirError(
                f"{self.storage.where(self.path)}: was made with other values of {', '.join(sorted(differing))}; "
                "restore them, choose another --out, or remove this folder and those of later iterations"
            )
        return True

    def readable_settings(self) -> dict[str, Any] | None:
        """Returns the manifest's settings; None without a manifest that can be read."""
        try:
            return self.manifest().settings if self.is_committed else None
        except RunDirError:
            return None

    def write_part(self, name: str, table: pa.Table) -> FileEntry:
        """Commits one part; if it exists, returns the existing part's entry."""
        data = table_to_bytes(table)
        try:
            self.storage.create(f"{self.path}/{name}", data)
        except FileExistsError:
            return self.part_entry(name)
        sha256, size = bytes_digest(data)
        return FileEntry(sha256=sha256, bytes=size, rows=table.num_rows)

    def replace_part(self, name: str, table: pa.Table) -> FileEntry:
        self.storage.delete(f"{self.path}/{name}")
        return self.write_part(name, table)

    def discard_parts(self) -> None:
        for name in self.part_names():
            self.storage.delete(f"{self.path}/{name}")

    def find_parts(self, expected: Sequence[str], fingerprint: str) -> FoundParts:
        """Finds an earlier attempt's sealed parts; deletes damaged ones.

        Raises:
            RunDirError: an undamaged part has another fingerprint or an unexpected name.
        """
        names, damaged = set(expected), 0
        whole: dict[str, FileEntry] = {}
        for name in self.part_names():
            opened = self.open_sealed(name)
            if opened is None:
                logger.warning("%s: is damaged; it is made again", self.storage.where(f"{self.path}/{name}"))
                self.storage.delete(f"{self.path}/{name}")
                damaged += 1
                continue
            table, entry = opened
            if name not in names or table.schema.metadata[FINGERPRINT] != fingerprint.encode():
                raise RunDirError(
                    f"{self.storage.where(f'{self.path}/{name}')}: was made from other inputs or with other settings; "
                    f"restore them, choose another --out, or remove {self.path}"
                )
            whole[name] = entry
        return FoundParts(whole, [name for name in expected if name not in whole], damaged)

    def open_sealed(self, name: str) -> tuple[pa.Table, FileEntry] | None:
        """Returns a sealed part and its entry; None if damaged."""
        try:
            table, entry = self.open_part(name)
            sealed = table.schema.metadata or {}
            whole = sealed.get(CHECKSUM) == _checksum(table, sealed.get(FINGERPRINT, b""))
        except (RunDirError, ValueError):  # no longer Parquet, or text that is no UTF-8
            return None
        return (table, entry) if whole else None

    def open_part(self, name: str) -> tuple[pa.Table, FileEntry]:
        """Returns an uncommitted part and its entry.

        Raises:
            RunDirError: the file is not Parquet.
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
        return [name for name in self.storage.entries(self.path) if name.startswith("part-")]

    def commit(
        self,
        files: dict[str, FileEntry],
        inputs: dict[str, str],
        settings: dict[str, Any],
        counts: dict[str, float] | None = None,
    ) -> Manifest:
        """Writes the manifest, after which the artefact never changes.

        Raises:
            RunDirError: already committed with other inputs or settings.
        """
        manifest = Manifest.of(files, inputs, settings, counts)
        try:
            self.storage.create(f"{self.path}/{MANIFEST}", manifest.to_bytes())
        except FileExistsError:
            self.already_made(inputs, settings)
            return self.manifest()
        return manifest

    def read_part(self, name: str, entry: FileEntry) -> pa.Table:
        """Returns a committed part.

        Raises:
            RunDirError: the part is missing or differs from its digest.
        """
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
        for name, entry in sorted(self.manifest().files.items()):
            yield self.read_part(name, entry)

    def local_folder(self, *, weights: bool = True) -> Path:
        files = {name: Digest(entry.sha256, entry.bytes) for name, entry in self.manifest().files.items()}
        return self.storage.local_folder(self.path, files if weights else without_weights(files))

    def verify(self) -> Manifest:
        """Checks every file against its digest.

        Raises:
            RunDirError: a file is missing or differs.
        """
        manifest = self.manifest()
        _check(self.storage, self.path, manifest)
        return manifest

    def checked_folder(self) -> Path:
        """Returns a local folder with every file checked. A store's files are downloaded only without a local copy.

        Raises:
            RunDirError: a file is missing or differs.
        """
        manifest, folder = self.manifest(), self.local_folder()
        _check(Storage(folder.parent), folder.name, manifest)
        return folder


def _check(storage: Storage, folder: str, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        where = f"{folder}/{name}"
        if not storage.exists(where) or storage.digest(where) != (entry.sha256, entry.bytes):
            raise RunDirError(
                f"{storage.where(where)}: is missing or differs from its digest; "
                f"restore it or remove {storage.where(folder)}"
            )


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns ``was_and_now`` of each setting that differs, by dotted names."""
    then, now = flatten(then), flatten(now)
    return was_and_now({key: (then.get(key), now.get(key)) for key in _differing(then, now)})


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))


def digests(*artefacts: Artefact) -> dict[str, str]:
    """Returns the digests of committed artefacts by path, as ``inputs`` of what is made from them."""
    return {artefact.path: artefact.manifest().digest for artefact in artefacts}


def seal(table: pa.Table, fingerprint: str) -> pa.Table:
    """Adds FINGERPRINT and CHECKSUM for ``Artefact.find_parts``."""
    mark = fingerprint.encode()
    return table.replace_schema_metadata({FINGERPRINT: mark, CHECKSUM: _checksum(table, mark)})


def _checksum(table: pa.Table, fingerprint: bytes) -> bytes:
    return digest([table.to_pydict(), fingerprint.hex()]).encode()


def folder_entries(folder: Path, without: Collection[Path] = ()) -> dict[str, FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, CARD))
    files = [path for path in files if path not in without]
    entries = {}
    for path in files:
        sha256, size = file_digest(path)
        entries[path.relative_to(folder).as_posix()] = FileEntry(sha256=sha256, bytes=size)
    return entries


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they come back from a manifest or a seal, e.g. lists in place of tuples."""
    return json.loads(json.dumps(settings))
