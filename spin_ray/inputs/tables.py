"""Rows of columnar files: Parquet, and Arrow as ``datasets`` saves it."""

import json
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from spin_ray.errors import DataError, first_line
from spin_ray.inputs.files import Slice, SourceRow, filesystem, kind_of, other_kind
from spin_ray.inputs.forms import COLUMNS, EXPLANATIONS, MATERIAL, MEDIA, OTHER_NAMES

_ALL = 2**31
_ROWS, _ROWS_OF_MEDIA = 2**16, 128
"""Parquet rows read at a time; fewer where texts may hold images."""
_Change = Callable[[Any], Any]
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)
_STRANGE = (KeyError, ValueError, OverflowError, TypeError)
"""Errors of pyarrow for values that Python cannot hold, e.g. the year 200000 or a map with structs as keys."""


def split_table(uri: str, width: int) -> list[Slice]:
    """Returns a slice per row group of Parquet, or per ``width`` bytes of Arrow.

    Raises:
        DataError: the file is not of its kind.
    """
    if kind_of(uri) == ".parquet":
        return [Slice(uri, group, group + 1) for group in range(_parquet(uri).num_row_groups)]
    if not isinstance(filesystem(uri)[0], pyarrow.fs.LocalFileSystem):
        return [Slice(uri, 0, _ALL)]  # finding the batches would read the whole file
    slices, start, size, number = [], 0, 0, -1
    for number, batch in enumerate(_batches(uri)):
        size += batch.nbytes
        if size >= width:
            slices.append(Slice(uri, start, number + 1))
            start, size = number + 1, 0
    return [*slices, Slice(uri, start, number + 1)] if number + 1 > start else slices


def count_table(uri: str) -> int:
    """Returns the number of rows; of Parquet only the footer is read.

    Raises:
        DataError: the file is not of its kind.
    """
    if kind_of(uri) == ".parquet":
        return _parquet(uri).metadata.num_rows
    return sum(batch.num_rows for batch in _batches(uri))


def read_table(piece: Slice, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    """Yields rows in which a null is a missing key; reads only the file's names in ``columns`` and those of forms.

    Raises:
        DataError: the file is damaged.
    """
    if kind_of(piece.uri) == ".parquet":
        file = _parquet(piece.uri)
        names = file.schema_arrow.names
        wanted = _wanted(file.schema_arrow, columns, piece.uri)
        first = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        leaves = _media_leaves(file.schema, {*names} - {*wanted})
        batches = file.iter_batches(_ROWS_OF_MEDIA if leaves else _ROWS, groups, [*wanted, *leaves])
        yield from _rows(piece.uri, batches, names, wanted, first, columns)
        return
    first = 0
    for number, batch in enumerate(_batches(piece.uri)):
        if number >= piece.stop:
            return
        if number >= piece.start:
            names = batch.schema.names
            wanted = _wanted(batch.schema, columns, piece.uri)
            media = [name for name in names if name in MEDIA and name not in wanted]
            yield from _rows(piece.uri, iter([batch.select([*wanted, *media])]), names, wanted, first, columns)
        first += batch.num_rows


def _wanted(schema: pa.Schema, columns: Mapping[str, str], uri: str) -> list[str]:
    """Returns the known columns; without any, those that Python can hold, for a hint."""
    names = schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{uri}: has the column {twice} twice")
    known = {*COLUMNS, *OTHER_NAMES, *columns.values()}
    if {"question", "answer"} <= ({*names} - {*columns.values()}) | {*columns}:
        known |= {
            it.name
            for it in schema
            if it.name.lower() in {*EXPLANATIONS, *MATERIAL} and not pa.types.is_nested(it.type)
        }
    return [name for name in names if name in known] or [
        field.name for field in schema if not any(pa.types.is_nested(kind) for kind in _key_types(field.type))
    ]


def _key_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Yields the types of the keys of all maps in a type."""
    return (part.key_type for part in _parts(kind) if pa.types.is_map(part))


def _parts(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Yields a type and all types within."""
    yield kind
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    for each in inner or ([kind.value_type] if pa.types.is_dictionary(kind) else []):
        yield from _parts(each)


def _media_leaves(schema: pq.ParquetSchema, unread: set[str]) -> list[str]:
    """Returns one part of each unread column of ``MEDIA`` that shows which rows are filled, e.g. image paths.

    Bytes are not read. Sizes are not asked for: pyarrow aborts the process if their metadata is damaged.
    """
    found: dict[str, str] = {}
    leaves = [schema.column(number) for number in range(len(schema))]
    for leaf in sorted(leaves, key=lambda leaf: leaf.physical_type == "BYTE_ARRAY"):  # texts last
        name, is_bytes = leaf.path.partition(".")[0], leaf.physical_type.endswith("BYTE_ARRAY")
        if name in MEDIA and name in unread and not (is_bytes and leaf.logical_type.type == "NONE"):
            found.setdefault(name, leaf.path)
    return list(found.values())


def _filled(column: pa.Array) -> list[bool]:
    kind = column.type
    if pa.types.is_primitive(kind):
        return [bool(value) and value == value for value in column.to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        column = pc.list_value_length(column)
    elif kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        column = pc.binary_length(column)
    else:
        return column.is_valid().to_pylist()
    return [bool(size) for size in column.to_pylist()]


def _rows(
    uri: str,
    batches: Iterator[pa.RecordBatch],
    names: list[str],
    wanted: list[str],
    first: int,
    columns: Mapping[str, str],
) -> Iterator[SourceRow]:
    unread = tuple(name for name in names if name not in wanted)
    while True:
        try:
            batch = next(batches)
            rows = batch.select(wanted).to_pylist(maps_as_pydicts="strict")
            media = {name: _filled(batch[name]) for name in batch.schema.names if name not in wanted}
        except StopIteration:
            return
        except _DAMAGED as error:
            raise DataError(f"{uri}: is damaged near row {first} ({first_line(error)})") from error
        except _STRANGE as error:
            raise DataError(f"{uri}: holds what cannot be read near row {first} ({first_line(error)})") from error
        without_nulls = _without_nulls_in(batch.schema, columns)
        unlike_json = [field.name for field in batch.schema if _is_unlike_json(field.type)]
        for offset, row in enumerate(rows):
            # pandas writes NaN, which differs from itself, for a missing number
            content = {name: value for name, value in row.items() if value is not None and value == value}
            for name in without_nulls.keys() & content.keys():
                content[name] = without_nulls[name](content[name])
            for name in unlike_json:
                if name in content:
                    content[name] = _as_in_json(content[name])
            raw = json.dumps(content, default=str).encode()
            left = tuple(name for name in unread if name not in media or media[name][offset]) if media else unread
            yield SourceRow(f"{uri}: row {first + offset}", content, raw, left)
        first += len(rows)


def _without_nulls_in(schema: pa.Schema, columns: Mapping[str, str]) -> dict[str, _Change]:
    """Returns, by column, the function that removes the nulls by which Arrow gives all structs the same keys.

    A template would write these nulls within tools, and within calls of any spelling. Answers keep their nulls,
    which graders compare. Messages of texts alone are left as they are, to save time.
    """
    answer = columns.get("answer", "answer")
    return {
        field.name: change
        for field in schema
        if field.name != answer and not _holds_texts_alone(field.type) and (change := _without_nulls(field.type))
    }


def _holds_texts_alone(kind: pa.DataType) -> bool:
    while not pa.types.is_struct(kind) and kind.num_fields:
        kind = kind.field(0).type
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    return bool(fields.keys() & {"role", "from"}) and not any(_without_nulls(each) for each in fields.values())


def _without_nulls(kind: pa.DataType) -> _Change | None:
    """Returns None for a type without structs. Nulls in lists and maps are the writer's own, and stay."""
    if pa.types.is_struct(kind):
        changes = {field.name: _without_nulls(field.type) or _same for field in kind}
        return lambda value: {key: changes[key](each) for key, each in value.items() if each is not None}
    inner = kind.item_type if pa.types.is_map(kind) else getattr(kind, "value_type", None)
    change = _without_nulls(inner) if inner is not None else None
    if change is None:
        return None
    if pa.types.is_map(kind):
        return lambda value: {key: each if each is None else change(each) for key, each in value.items()}
    return lambda value: [each if each is None else change(each) for each in value]


def _is_unlike_json(kind: pa.DataType) -> bool:
    return any(map(_is_no_key, _key_types(kind))) or any(
        pa.types.is_decimal(part) or pa.types.is_temporal(part) or part == pa.uuid() for part in _parts(kind)
    )


def _is_no_key(kind: pa.DataType) -> bool:
    return not (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _as_in_json(value: Any) -> Any:
    """Returns what a JSON file would hold: decimals as numbers, dates and UUIDs as texts, and texts as keys.

    Bytes stay, except as keys.
    """
    if isinstance(value, dict):
        return {_text_key(key): _as_in_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_in_json(each) for each in value]
    if isinstance(value, Decimal):
        numerator, denominator = value.as_integer_ratio()
        return numerator if denominator == 1 else float(value)
    return value if value is None or isinstance(value, str | int | float | bytes) else str(value)


def _text_key(key: Any) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else str(key)


def _same(value: Any) -> Any:
    return value


def _parquet(uri: str) -> pq.ParquetFile:
    store, path = filesystem(uri)
    try:
        return pq.ParquetFile(store.open_input_file(path))
    except _DAMAGED as error:
        raise DataError(f"{uri}: is not a Parquet file ({_other_kind(uri) or first_line(error)})") from error


def _other_kind(uri: str) -> str | None:
    store, path = filesystem(uri)
    with store.open_input_file(path) as file:
        return other_kind(file.read(64), kind_of(uri))


def _batches(uri: str) -> Iterator[pa.RecordBatch]:
    store, path = filesystem(uri)
    local = isinstance(store, pyarrow.fs.LocalFileSystem)
    try:
        with pa.memory_map(path) if local else store.open_input_file(path) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                source.seek(0)
                yield from pa.ipc.open_stream(source)
    except _DAMAGED as error:
        raise DataError(f"{uri}: is not an Arrow file ({_other_kind(uri) or first_line(error)})") from error
