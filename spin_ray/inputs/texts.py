"""Rows of text files: JSON lines, JSON arrays, CSV and TSV."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from spin_ray.errors import DataError, first_line
from spin_ray.inputs.files import CHUNK, Slice, SourceRow, codec_of, filesystem, head_of, kind_of, open_text

_DECODE = json.JSONDecoder().decode
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
"""A whole string, a bracket, or the beginning of a string that goes on behind what was read."""


def split_text(uri: str, size: int, width: int) -> list[Slice]:
    """Returns slices of about ``width`` bytes; a compressed file or a CSV file is one.

    Raises:
        DataError: the file is UTF-16, or an array without an end.
    """
    head = head_of(uri)
    if codec_of(uri) or kind_of(uri) in (".csv", ".tsv"):
        return [Slice(uri, 0, size)]
    if not _is_array(uri, head):
        return [Slice(uri, start, min(start + width, size)) for start in range(0, size, width)]
    starts: list[int] = []
    with open_text(uri) as file:
        for start, _ in _elements(file, uri, 0):
            if not starts or start >= starts[-1] + width:
                starts.append(start)
    return [Slice(uri, start, stop) for start, stop in zip(starts, [*starts[1:], size], strict=True)]


def read_text(piece: Slice) -> Iterator[SourceRow]:
    """Yields the rows of a slice; raises DataError for a file that cannot be read."""
    if kind_of(piece.uri) in (".csv", ".tsv"):
        rows = _read_csv(piece.uri)
    elif _is_array(piece.uri, None):
        rows = _read_array(piece)
    else:
        rows = _read_lines(piece)
    try:
        yield from rows
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{piece.uri}: is damaged ({first_line(error)})") from error


def _is_array(uri: str, head: bytes | None) -> bool:
    return kind_of(uri) == ".json" and (head_of(uri) if head is None else head).startswith(b"[")


def _read_lines(piece: Slice) -> Iterator[SourceRow]:
    """Yields the lines that start in the slice; all, if the file is compressed."""
    path, whole = filesystem(piece.uri)[1], codec_of(piece.uri) is not None
    with open_text(piece.uri) as file:
        position, line_number = piece.start, 0
        if piece.start:
            file.seek(piece.start - 1)
            position += len(file.readline()) - 1  # the line that starts before the slice belongs to the one before
        while whole or position < piece.stop:
            line = file.readline()
            if not line and whole:
                return
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


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        # Such a line is UTF-8; ``json.loads`` would spend as long on detecting that as on parsing.
        content = _DECODE(str(line, "utf-8", "surrogatepass")) if line.startswith(b'{"') else json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_array(piece: Slice) -> Iterator[SourceRow]:
    path = filesystem(piece.uri)[1]
    with open_text(piece.uri) as file:
        if codec_of(piece.uri):
            found = _elements(file, piece.uri, 0)
        else:
            file.seek(piece.start)
            part = io.BytesIO(file.read(piece.stop - piece.start))
            found = _elements(part, piece.uri, 1)
        for start, raw in found:
            yield SourceRow(f"{path}: byte {piece.start + start}", _parse(raw), raw)


def _elements(file: BinaryIO | io.BufferedReader, uri: str, depth: int) -> Iterator[tuple[int, bytes]]:
    """Yields place and bytes of each element of a JSON array, reading a chunk at a time.

    ``depth`` is 0 before the array's bracket, 1 behind it: a part of an array need not have an end.

    Raises:
        DataError: the array has no end.
    """
    part = depth == 1
    buffer, base, at, done = b"", 0, 0, 0  # ``base``: place of the buffer; ``done``: end of the last element in it
    while chunk := file.read(CHUNK):
        buffer += chunk
        resume = len(buffer)
        for token in _TOKEN.finditer(buffer, at):
            mark = token.group()
            if mark == b'"':
                resume = token.start()
                break
            if mark in b"[{":
                if depth == 1 and (loose := buffer[done : token.start()].strip(b", \t\r\n")):
                    yield base + done, loose
                if depth <= 1:
                    done = token.end() if depth == 0 else token.start()
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 1:
                    yield base + done, buffer[done : token.end()]
                    done = token.end()
                elif depth == 0:
                    if loose := buffer[done : token.start()].strip(b", \t\r\n"):
                        yield base + done, loose
                    return
        buffer, base, at, done = buffer[done:], base + done, resume - done, 0
    if not part:
        raise DataError(f"{uri}: the array has no end; the file was cut off")


def _read_csv(uri: str) -> Iterator[SourceRow]:
    """Yields the rows under the header; an empty cell is a column that the row lacks."""
    path = filesystem(uri)[1]
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(open_text(uri), encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t" if kind_of(uri) == ".tsv" else ",")
        try:
            header = next(rows, [])
            for number, cells in enumerate(rows):
                if not cells:
                    continue
                content = {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
                fits = len(cells) == len(header)
                raw = json.dumps(content if fits else cells, ensure_ascii=False).encode()
                yield SourceRow(f"{path}: row {number}", content if fits else None, raw)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read near line {rows.line_num} ({first_line(error)})") from error
