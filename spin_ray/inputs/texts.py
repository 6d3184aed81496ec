"""Rows of text files: JSON lines, JSON arrays, CSV and TSV."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import pyarrow as pa

from spin_ray.errors import DataError, first_line
from spin_ray.inputs.files import CHUNK, Slice, SourceRow, codec_of, filesystem, head_of, json_kind, kind_of, open_text
from spin_ray.inputs.forms import COLUMNS, jq_key

_MARGIN = 1.05
"""Factor of estimates, as one chunk differs from another."""
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
"""A whole string, a bracket, or the quote of an incomplete string."""


def split_text(uri: str, size: int, width: int) -> list[Slice]:
    """Returns slices of about ``width`` bytes; a compressed file or CSV file is one slice.

    Raises:
        DataError: the file is not UTF-8, an unfinished array, or not one object a line.
    """
    head = head_of(uri)
    table = kind_of(uri) in (".csv", ".tsv")
    array = not table and _is_array(uri, head)
    if not table and not array:
        _refuse_other_layouts(uri)
    if table or codec_of(uri):
        return [Slice(uri, 0, size)]
    if not array:
        return [Slice(uri, start, min(start + width, size)) for start in range(0, size, width)]
    starts: list[int] = []
    with open_text(uri) as file:
        for start, _ in _elements(file, uri, 0):
            if not starts or start >= starts[-1] + width:
                starts.append(start)
    return [Slice(uri, start, stop) for start, stop in zip(starts, [*starts[1:], size][: len(starts)], strict=True)]


def _refuse_other_layouts(uri: str) -> None:
    """Refuses objects that are not alone on one line. A damaged first line is only a bad row."""
    text = head_of(uri, CHUNK).decode(errors="replace")
    end = _end_of_object(text) or (CHUNK if re.match(r'\{\s*\n\s*"', text) else 0)  # it may be longer than a chunk
    if "\n" in text[:end].strip():
        found = _INSIDE.search(text[:end])
        path = f"{jq_key(found[1])}[]" if found and found[1] not in COLUMNS else "."
        raise DataError(
            f"{uri}: has an object over several lines; write an object a line (jq -c '{path}' FILE > NEW.jsonl), or an "
            "array of objects"
        )
    rest, _, others = text[end:].partition("\n")
    several = end and _end_of_object(rest.lstrip())
    if several and rest.startswith("\r"):
        raise DataError(f"{uri}: its lines end with a carriage return alone: tr '\\r' '\\n' < FILE > NEW.jsonl")
    if several:
        raise DataError(f"{uri}: has several objects on a line; write an object a line: jq -c . FILE > NEW.jsonl")
    if end and others.strip() and rest.strip() == ",":
        raise DataError(f"{uri}: has a comma behind its objects; take it away: sed 's/,\\r*$//' FILE > NEW.jsonl")


def _end_of_object(text: str) -> int:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return end if isinstance(value, dict) else 0


_INSIDE = re.compile(r'^\s*\{.*?"([^"\\\n]+)":\s*\[\s*\{', re.DOTALL)


def read_text(piece: Slice) -> Iterator[SourceRow]:
    """Yields the rows of a slice; raises DataError if it cannot be read."""
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


def count_text(uri: str) -> int:
    """Returns the number of rows without blank lines; JSON is not parsed.

    Raises:
        DataError: the file cannot be read.
    """
    if kind_of(uri) in (".csv", ".tsv"):
        return sum(1 for _ in read_text(Slice(uri, 0, 0)))
    array = _is_array(uri, None)
    try:
        with open_text(uri) as file:
            return sum(1 for _ in _elements(file, uri, 0)) if array else sum(1 for line in file if line.strip())
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{uri}: is damaged ({first_line(error)})") from error


def estimate_text(uri: str, size: int) -> int:
    """Estimates the rows of uncompressed JSON of ``size`` bytes from its first chunk, rather too many than too few.

    Raises:
        DataError: the file cannot be read.
    """
    if size <= CHUNK:
        return count_text(uri)
    head, places = head_of(uri, CHUNK), [0]
    if _is_array(uri, head):
        with suppress(DataError):  # the chunk ends within the array
            for start, _ in _elements(io.BytesIO(head), uri, 0):
                places.append(start)
    else:
        places += [found.end() for found in re.finditer(rb"\S[^\n]*\n", head[: head.rfind(b"\n") + 1])]
    return max(1, round(_MARGIN * size * (len(places) - 1) / max(places[-1], 1)))


def _is_array(uri: str, head: bytes | None) -> bool:
    """Tells a JSON array, in a file of any name, from lines of which the first is an array."""
    head = head_of(uri) if head is None else head
    if not head.startswith(b"[") or not (kind_of(uri) == ".json" or re.match(rb"\[\s*\{", head)):
        return False
    first, newline, rest = head_of(uri, CHUNK).partition(b"\n")
    return not (newline and rest.strip() and isinstance(_parsed(first)[0], list))


def _read_lines(piece: Slice) -> Iterator[SourceRow]:
    """Yields the lines that start in the slice; all, if the file is compressed."""
    path, whole = filesystem(piece.uri)[1], codec_of(piece.uri) is not None
    with open_text(piece.uri) as file:
        position, line_number = piece.start, 0
        if piece.start:
            file.seek(piece.start - 1)
            position += len(file.readline()) - 1  # a line that starts before the slice belongs to the previous slice
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
                yield _row(origin, line.rstrip(b"\r\n"))


def _row(origin: str, raw: bytes) -> SourceRow:
    content, fault = _parsed(raw)
    if isinstance(content, dict):
        return SourceRow(origin, content, raw)
    return SourceRow(origin, None, raw, fault=fault or f"not a JSON object but of type {type(content).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key {twice!r} twice")
    return found


_DECODE = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=lambda name: None if name == "NaN" else float(name)
).decode
"""Reads JSON without duplicate keys; NaN, pandas' missing value, becomes null."""


def _parsed(raw: bytes) -> tuple[Any, str]:
    try:
        return _DECODE(str(raw.removeprefix(b"\xef\xbb\xbf"), "utf-8", "surrogatepass").strip()), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte 0x{raw[error.start]:02x}); write the file as UTF-8: iconv -f ENCODING -t UTF-8"
    except json.JSONDecodeError as error:
        return None, f"not a JSON object ({error.msg} at character {error.pos + 1})"
    except RecursionError:
        return None, "not a JSON object (too deep)"
    except ValueError as error:
        return None, f"not a JSON object ({first_line(error)})"


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
            yield _row(f"{path}: byte {piece.start + start}", raw)


def _elements(file: BinaryIO | io.BufferedReader, uri: str, depth: int) -> Iterator[tuple[int, bytes]]:
    """Yields place and bytes of each element of a JSON array, a chunk at a time.

    ``depth`` is 0 before the array's bracket; it is 1 for a part behind the bracket, which may lack an end.

    Raises:
        DataError: the array has no end, or something follows it.
    """
    part = depth == 1
    buffer, base, at, done = b"", 0, 0, 0  # base: offset of the buffer in the file; done: end of its last element
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
                    if (buffer[token.end() :] + file.read(CHUNK)).strip():
                        raise DataError(f"{uri}: goes on behind its array; write an object a line, or one array")
                    return
        buffer, base, at, done = buffer[done:], base + done, resume - done, 0
    if not part:
        raise DataError(f"{uri}: the array has no end; the file was cut off")


def _read_csv(uri: str) -> Iterator[SourceRow]:
    path = filesystem(uri)[1]
    _check_marks(head_of(uri, CHUNK).decode(errors="replace"), path, "\t" if kind_of(uri) == ".tsv" else ",")
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(open_text(uri), encoding="utf-8-sig", newline="") as text:
        # Strict: otherwise '"Hi" he said' would lose its quotes silently.
        rows = csv.reader(text, delimiter="\t" if kind_of(uri) == ".tsv" else ",", strict=True)
        try:
            header = next((cells for cells in rows if cells), [])
            _check_header(header, path)
            for number, cells in enumerate(rows):
                if cells == header:
                    raw = json.dumps(cells, ensure_ascii=False).encode()
                    yield SourceRow(f"{path}: row {number}", None, raw, fault="is the header again")
                elif cells:
                    yield _row_of_cells(f"{path}: row {number}", cells, header)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{path}: cannot be read near line {rows.line_num + 1} ({first_line(error)}); it must be UTF-8, with "
                'quotes in a quoted cell as ""'
            ) from error


def _check_marks(text: str, path: str, mark: str) -> None:
    if found := json_kind(text):
        raise DataError(f"{path}: {found}")
    if re.match(r'"?sep=.', text, re.IGNORECASE):
        raise DataError(f"{path}: begins with Excel's line sep=; take it away: tail -n +2 FILE > NEW.csv")
    header = re.sub(r'"(?:[^"]|"")*"', "", text).lstrip().partition("\n")[0]
    cells = {each: {cell.strip() for cell in header.split(each)} for each in ",;\t|"}
    other = max(cells.keys() - {mark}, key=lambda each: (header.count(each), each))
    known = {each: not cells[each].isdisjoint(COLUMNS) for each in cells}
    if other in header and (mark not in header or (known[other] and not known[mark])):
        raise DataError(f"{path}: its columns are parted by {other!r}; a .csv has commas, a .tsv has tabs")


def _check_header(header: list[str], path: str) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path}: has the column {twice[0]} twice")


def _row_of_cells(origin: str, cells: list[str], header: list[str]) -> SourceRow:
    raw = json.dumps(cells, ensure_ascii=False).encode()
    if len(cells) != len(header):
        return SourceRow(origin, None, raw, fault=f"has {len(cells)} cells, the header {len(header)}")
    if all(len(cell) > 1 and cell[0] == cell[-1] == "'" for cell in cells):
        return SourceRow(origin, None, raw, fault="its cells are in single quotes; CSV has double ones")
    content = {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}
    return SourceRow(origin, content, json.dumps(content, ensure_ascii=False).encode())
