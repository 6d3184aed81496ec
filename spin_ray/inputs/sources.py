"""Data files, slices of them, and rows."""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from spin_ray.errors import DataError, first_line

SLICE_BYTES = 2**20
MOST_SLICES = 4096
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
COLUMNS = ("messages", "prompt", "response", "chosen", "rejected", "answer")
"""Columns that are read of Parquet; JSONL rows come whole."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of a file, in bytes of JSONL or row groups of Parquet."""

    uri: str
    start: int
    stop: int


class SourceRow(NamedTuple):
    origin: str
    """File and place."""
    content: dict[str, Any] | None
    """None: the row is no JSON object."""
    raw: bytes
    """The row's bytes (for Parquet: JSON)."""


def find_files(source: str) -> list[str]:
    """Returns the sorted files of a path, folder, glob or URI.

    Raises:
        DataError: a file is missing, empty or of an unknown kind.
    """
    filesystem, path = _filesystem(source)
    try:
        infos = [info for info in _listed(filesystem, path) if info.type == pyarrow.fs.FileType.File]
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({' '.join(str(error).split())})") from error
    if not infos:
        raise DataError(f"{source}: no such data (a .jsonl or .parquet file, a folder of them, a glob or a URI)")
    for info in infos:
        if not info.path.endswith(SUFFIXES):
            raise DataError(f"{info.path}: unknown kind of data file; expected one of {', '.join(SUFFIXES)}")
        if info.size == 0:
            raise DataError(f"{info.path}: is empty")
    prefix = source[: source.index("://") + 3] if "://" in source else ""
    return sorted(prefix + info.path for info in infos)


def _listed(filesystem: pyarrow.fs.FileSystem, path: str) -> list[pyarrow.fs.FileInfo]:
    if "*" in path:
        base = path[: path[: path.index("*")].rfind("/") + 1]
        below = "/" in path[len(base) :]
        infos = filesystem.get_file_info(pyarrow.fs.FileSelector(base, recursive=below, allow_not_found=True))
        return [info for info in infos if _matches(info.path, path)]
    info = filesystem.get_file_info(path)
    if info.type != pyarrow.fs.FileType.Directory:
        return [info]
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    return [info for info in infos if info.path.endswith(SUFFIXES)]


def _matches(path: str, glob: str) -> bool:
    """Matches a glob, in which ``**/`` is any number of folders."""
    any_folders, any_name = re.escape("**/"), re.escape("*")
    return re.fullmatch(re.escape(glob).replace(any_folders, "(?:.+/)?").replace(any_name, "[^/]*"), path) is not None


def files_digest(files: list[str]) -> str:
    """Returns a SHA-256 of local files' content, and of remote files' name, size and time."""
    total = hashlib.sha256()
    for uri in files:
        filesystem, path = _filesystem(uri)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            info = filesystem.get_file_info(path)
            total.update(f"{uri} {info.size} {info.mtime_ns}".encode())
    return total.hexdigest()


def split(files: list[str]) -> list[Slice]:
    """Returns slices of 1 MiB (more for large data) or of row groups; raises DataError if there are none."""
    sizes = {uri: _size(uri) for uri in files}
    width = max(SLICE_BYTES, sum(sizes.values()) // MOST_SLICES)
    slices = []
    for uri in files:
        if uri.endswith(".parquet"):
            groups = _parquet(uri).num_row_groups
            slices += [Slice(uri, group, group + 1) for group in range(groups)]
        else:
            slices += [Slice(uri, start, min(start + width, sizes[uri])) for start in range(0, sizes[uri], width)]
    if not slices:
        raise DataError(f"{', '.join(files)}: holds no rows")
    return slices


def _size(uri: str) -> int:
    filesystem, path = _filesystem(uri)
    return filesystem.get_file_info(path).size


def read_slice(piece: Slice) -> Iterator[SourceRow]:
    """Yields the rows of a slice; a line belongs to the slice in which it starts."""
    if piece.uri.endswith(".parquet"):
        yield from _read_parquet(piece)
    else:
        yield from _read_lines(piece)


def _read_lines(piece: Slice) -> Iterator[SourceRow]:
    filesystem, path = _filesystem(piece.uri)
    with io.BufferedReader(filesystem.open_input_file(path), buffer_size=2**20) as file:
        position, line_number = piece.start, 0
        if piece.start:
            file.seek(piece.start - 1)
            position += len(file.readline()) - 1  # the line that starts before the slice belongs to the one before
        while position < piece.stop:
            line = file.readline()
            if not line:
                raise DataError(f"{path}: has become shorter while it was read")
            position += len(line)
            line_number += 1
            if line.strip():
                origin = (
                    f"{path}:{line_number}"
                    if not piece.start
                    else f"{path}: line {line_number} after byte {piece.start}"
                )
                yield SourceRow(origin, _parse(line), line.rstrip(b"\r\n"))


_DECODE = json.JSONDecoder().decode


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        # Such a line is UTF-8; ``json.loads`` would spend as long on detecting that as on parsing.
        content = _DECODE(str(line, "utf-8", "surrogatepass")) if line.startswith(b'{"') else json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_parquet(piece: Slice) -> Iterator[SourceRow]:
    """Yields rows as JSONL has them: a null is a missing key."""
    file = _parquet(piece.uri)
    wanted = [name for name in COLUMNS if name in file.schema_arrow.names]
    first = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    batches = file.iter_batches(row_groups=list(range(piece.start, piece.stop)), columns=wanted)
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{piece.uri}: is damaged near row {first} ({first_line(error)})") from error
        for offset, row in enumerate(rows):
            content = {name: value for name, value in row.items() if value is not None}
            yield SourceRow(f"{piece.uri}: row {first + offset}", content, json.dumps(content, default=str).encode())
        first += len(rows)


def _parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = _filesystem(uri)
    try:
        file = pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: is not a Parquet file ({first_line(error)})") from error
    names = file.schema_arrow.names
    if not {"messages", "prompt", "chosen"} & set(names):
        raise DataError(
            f"{uri}: has only the columns {', '.join(sorted(names))}; needs messages, or prompt and response (or "
            "chosen and rejected), or prompt alone for questions, or chosen and rejected that are lists of messages"
        )
    return file


def _filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if uri.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(HfFileSystem())), uri.removeprefix("hf://")
    if "://" not in uri:
        if not uri:
            raise DataError("data: the path is empty")
        return pyarrow.fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())  # Ray workers run in other folders
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: cannot be opened ({error})") from error
