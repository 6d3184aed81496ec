"""SFT data as it comes: which files a source stands for, and every row of them exactly once."""

import csv
import gzip
import io
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.config.sections import DataConfig
from spin_ray.errors import DataError
from spin_ray.inputs import sources, texts
from spin_ray.inputs.forms import find_form
from spin_ray.inputs.sources import files_digest, find_files, read_slice, skipped_files, split

LINE = '{"prompt": "p", "response": "r"}\n'


def rows_of(*files: Path | str) -> list[sources.SourceRow]:
    return [row for piece in split([str(file) for file in files]) for row in read_slice(piece)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five files in four folders, and the working directory in the first."""
    for name in ("a.jsonl", "b.parquet", "notes.txt", "sub/a.jsonl", "sub/deep/c.ndjson", "sub/deep/data/a.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"prompt": ["p"], "response": ["r"]}), path)
        else:
            path.write_text(LINE if "son" in path.suffix else "notes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Files


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("sub", ["sub/a.jsonl", "sub/deep/c.ndjson", "sub/deep/data/a.jsonl"]),
        ("sub/", ["sub/a.jsonl", "sub/deep/c.ndjson", "sub/deep/data/a.jsonl"]),
        ("*.jsonl", ["a.jsonl"]),
        ("sub/*.jsonl", ["sub/a.jsonl"]),
        ("*/a.jsonl", ["sub/a.jsonl"]),
        ("*/*/*.ndjson", ["sub/deep/c.ndjson"]),
        ("**/a.jsonl", ["a.jsonl", "sub/a.jsonl", "sub/deep/data/a.jsonl"]),
        ("sub/**/*son*", ["sub/a.jsonl", "sub/deep/c.ndjson", "sub/deep/data/a.jsonl"]),
        (".", ["a.jsonl", "b.parquet", "sub/a.jsonl", "sub/deep/c.ndjson", "sub/deep/data/a.jsonl"]),
    ],
)
def test_a_source_is_a_file_a_folder_or_a_glob_and_its_files_come_sorted_and_absolute(folder, source, found):
    """Absolute, because the tasks that read them run in other folders."""
    expected = [str(folder / name) for name in found]
    assert find_files(source) == expected
    assert find_files(str(folder / source)) == expected
    if source != ".":
        assert find_files(f"file://{folder}/{source}") == [f"file://{path}" for path in expected]


def test_the_google_account_of_a_run_reads_its_data_too(tmp_path, monkeypatch):
    """pyarrow looks for it under another name than the store of runs. There is no such file here, which it tells."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "none.json"))
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"^gs://bucket/a\.jsonl: no Google account was found; name its file by"):
        find_files("gs://bucket/a.jsonl")
    assert time.monotonic() - begun < 5


def test_characters_that_mean_something_to_regular_expressions_are_plain(tmp_path):
    for name in ("a+b.jsonl", "aab.jsonl", "(x).jsonl"):
        (tmp_path / name).write_text(LINE)
    assert find_files(str(tmp_path / "a+*.jsonl")) == [str(tmp_path / "a+b.jsonl")]
    assert find_files(str(tmp_path / "(*).jsonl")) == [str(tmp_path / "(x).jsonl")]


def test_a_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert find_files("~/a.jsonl") == [str(folder / "a.jsonl")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", "none.jsonl: no such data"),
        ("none/*.jsonl", "none/*.jsonl: no such data"),
        ("a.jsonl/x", "a.jsonl/x: no such data"),
        ("notes.txt", "notes.txt: unknown kind of data file; expected one of .jsonl, .ndjson, .json, .parquet"),
        ("*.txt", "notes.txt: unknown kind of data file"),
        ("", "the path is empty"),
        ("nosuch://bucket/a.jsonl", "nosuch://bucket/a.jsonl: cannot be opened"),
    ],
)
def test_a_source_that_stands_for_no_data_is_an_error_that_names_it(folder, source, message):
    with pytest.raises(DataError) as caught:
        find_files(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_error_that_names_it(folder):
    (folder / "sub/empty.jsonl").touch()
    with pytest.raises(DataError, match=r"sub/empty\.jsonl: is empty"):
        find_files("sub")


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such data"):
        find_files(str(tmp_path))


def test_a_source_that_may_not_be_listed_is_an_error_in_one_line(folder, monkeypatch):
    class Locked(pa.fs.LocalFileSystem):
        def get_file_info(self, _):
            raise PermissionError("denied.\nDetail: bucket policy")

    monkeypatch.setattr(sources, "_filesystem", lambda uri: (Locked(), uri))
    with pytest.raises(DataError, match=r"^s3://b/x: cannot be read \(denied\. Detail: bucket policy\)$"):
        find_files("s3://b/x")


def test_digest_follows_the_content_of_the_files_and_not_their_times_or_place(folder, tmp_path_factory):
    before = files_digest(find_files("sub"))
    os.utime("sub/a.jsonl", (1, 1))
    assert files_digest(find_files("sub")) == before
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "sub"
    (folder / "sub").rename(elsewhere)
    assert files_digest(find_files(str(elsewhere))) == before
    (elsewhere / "a.jsonl").write_text(LINE.upper())
    assert files_digest(find_files(str(elsewhere))) != before


# JSON lines


lines = st.lists(
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b""))
    | st.dictionaries(st.text(max_size=2), st.text(max_size=3), max_size=2).map(lambda row: json.dumps(row).encode()),
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(lines, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 40))
def test_every_line_is_read_once_and_in_order_wherever_the_slices_end(
    tmp_path_factory, contents, newline, ends_with_newline, slice_bytes
):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    contents = [b"the first line", *contents]
    path.write_bytes(newline.join(contents) + (newline if ends_with_newline else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SLICE_BYTES", slice_bytes)
        pieces = split([str(path)])
        assert [piece.start for piece in pieces] == list(range(0, path.stat().st_size, slice_bytes))
        found = [row.raw for piece in pieces for row in read_slice(piece)]
    assert found == [line for line in contents if line.strip()]


def test_a_line_longer_than_many_slices_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 10)
    long = json.dumps({"prompt": "x" * 95, "response": "y"})
    (tmp_path / "a.jsonl").write_text(f"{LINE}{long}\n{LINE}")
    assert [row.content["prompt"] for row in rows_of(tmp_path / "a.jsonl")] == ["p", "x" * 95, "p"]


def test_a_row_knows_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{LINE}\n\n{LINE}")
    assert [row.origin for row in rows_of(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:4"]


def test_a_row_of_a_later_slice_can_be_looked_up(tmp_path, monkeypatch):
    """Two lines of 33 bytes; the slice that starts at byte 20 holds the second."""
    monkeypatch.setattr(sources, "SLICE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text(LINE * 2)
    assert rows_of(tmp_path / "a.jsonl")[1].origin == f"{tmp_path}/a.jsonl: line 1 after byte 20"


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE * 2)
    pieces = split([str(tmp_path / "a.jsonl")])
    (tmp_path / "a.jsonl").write_text(LINE)
    with pytest.raises(DataError, match="has become shorter while it was read"):
        [row for piece in pieces for row in read_slice(piece)]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1, 2]",
        b'"text"',
        b"7",
        b"null",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b"\x00",
    ],
)
def test_a_line_that_is_no_json_object_comes_without_content_and_as_it_was(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + LINE.encode())
    bad, good = rows_of(tmp_path / "a.jsonl")
    assert (bad.content, bad.raw) == (None, line)
    assert good.content == {"prompt": "p", "response": "r"}


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.encode())
    assert rows_of(tmp_path / "a.jsonl")[0].content == {"prompt": "p", "response": "r"}


# Parquet


def test_rows_of_parquet_come_in_order_with_their_number(tmp_path):
    """Five rows in row groups of two: three slices."""
    path = tmp_path / "a.parquet"
    table = pa.table({"id": range(5), "prompt": list("abcde"), "response": list("vwxyz"), "answer": [1.0] * 5})
    pq.write_table(table, path, row_group_size=2)
    assert [(piece.start, piece.stop) for piece in split([str(path)])] == [(0, 1), (1, 2), (2, 3)]
    found = rows_of(path)
    assert [row.content for row in found][3] == {"prompt": "d", "response": "y", "answer": 1.0}
    assert [row.origin for row in found] == [f"{path}: row {number}" for number in range(5)]
    assert json.loads(found[4].raw) == found[4].content


def test_messages_of_parquet_are_lists_of_roles_and_contents(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet")[0].content == {"messages": messages}


@pytest.mark.parametrize("content", [b"hello", b"PAR1" + b"x" * 40 + b"PAR1", LINE.encode()])
def test_a_file_that_is_called_parquet_and_is_not_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file"):
        split([str(path)])


def test_a_parquet_file_of_other_columns_is_refused_with_what_it_has_and_what_it_needs(tmp_path):
    pq.write_table(pa.table({"text": ["t"], "response": ["r"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        find_form(rows_of(tmp_path / "a.parquet"), DataConfig(train="d"))
    assert str(caught.value).startswith(f"{tmp_path}/a.parquet: row 0: needs messages, or prompt and response")
    assert "nearest is prompt_response, which lacks prompt" in str(caught.value)


def test_parquet_without_rows_gives_none(tmp_path):
    text = pa.array([], pa.string())
    pq.write_table(pa.table({"prompt": text, "response": text}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == []


def test_parquet_without_even_a_row_group_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.ParquetWriter(path, pa.schema([("prompt", pa.string()), ("response", pa.string())])).close()
    with pytest.raises(DataError, match=r"a\.parquet: holds no rows"):
        split([str(path)])


def test_kinds_of_files_may_be_mixed(folder):
    assert len(rows_of(*find_files("."))) == sources.count_rows(find_files(".")) == 5


# Other kinds of files

EVERY = [{"prompt": f'é{number} \\ "[{{', "response": "r" * number} for number in range(1, 8)]


@pytest.mark.parametrize("pack", [lambda raw: raw, gzip.compress, lambda raw: pa.compress(raw, "zstd", asbytes=True)])
@pytest.mark.parametrize("kind", ["lines", "CRLF", "array", "indented", "csv", "tsv"])
def test_text_files_of_every_kind_give_the_same_rows(tmp_path, kind, pack, monkeypatch):
    """All begin with a byte order mark; small chunks cut strings and escapes of the array."""
    monkeypatch.setattr(texts, "CHUNK", 7)
    monkeypatch.setattr(sources, "SLICE_BYTES", 60)
    if kind in ("csv", "tsv"):
        out = io.StringIO()
        rows = csv.DictWriter(out, ["prompt", "response"], delimiter="," if kind == "csv" else "\t")
        rows.writeheader()
        rows.writerows(EVERY)
        text, suffix = out.getvalue(), f".{kind}"
    elif kind in ("lines", "CRLF"):
        newline = "\n" if kind == "lines" else "\r\n"
        text, suffix = "".join(json.dumps(row, ensure_ascii=False) + newline for row in EVERY), ".jsonl"
    else:
        text, suffix = json.dumps(EVERY, indent=2 if kind == "indented" else None, ensure_ascii=False), ".json"
    raw = pack(b"\xef\xbb\xbf" + text.encode())
    ending = {b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst"}.get(raw[:2], "")
    path = tmp_path / f"a{suffix}{ending}"
    path.write_bytes(raw)
    assert find_files(str(path)) == [str(path)]
    assert [row.content for row in rows_of(path)] == EVERY
    assert sources.count_rows([str(path)]) == len(EVERY)
    assert (len(split([str(path)])) > 1) == (not ending and kind not in ("csv", "tsv"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.jsonl.gz", "a.ndjson.zst"])
@pytest.mark.parametrize("form", ["array", "lines", "lines of lists"])
def test_rows_are_counted_as_they_are_read_whatever_the_file_is_called(tmp_path, name, form):
    """An array is told by its content; lines of which the first is a list are lines."""
    rows = [[], *EVERY] if form == "lines of lists" else EVERY
    text = json.dumps(rows) if form == "array" else "\n\n".join(map(json.dumps, rows))
    pack = {".gz": gzip.compress, "zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}.get(name[-3:], bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    path = str(tmp_path / name)
    assert sources.count_rows([path]) == len(rows_of(path)) == len(rows)


@pytest.mark.parametrize("content", [b"PAR1 and no more", b'{"prompt": "p"}'])
def test_rows_of_a_file_that_is_not_of_its_kind_are_an_error_in_one_line(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file"):
        sources.count_rows([str(tmp_path / "a.parquet")])


def test_rows_are_estimated_without_reading_all(tmp_path, monkeypatch):
    """Rather too many than too few; of ten files of Parquet eight are opened, and what would be read whole is not."""
    rows = [{"prompt": f"question {number:04}", "response": "r" * (number % 7)} for number in range(1000)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    monkeypatch.setattr(texts, "CHUNK", 5000)
    for name in ("lines.jsonl", "array.json"):
        assert len(rows) <= (sources.estimate_rows([str(tmp_path / name)]) or 0) <= 1.1 * len(rows)
    monkeypatch.setattr(texts, "CHUNK", 2**20)
    assert sources.estimate_rows([str(tmp_path / "lines.jsonl"), str(tmp_path / "array.json")]) == 2 * len(rows)
    for number in range(8):
        pq.write_table(pa.table({"prompt": ["p"] * 5}), tmp_path / f"{number}.parquet")
    assert sources.estimate_rows([str(tmp_path / f"{number}.parquet") for number in range(10)]) == 50
    for name in ("a.csv", "a.jsonl.gz", "a.arrow"):
        assert sources.estimate_rows([str(tmp_path / name)]) is None


@pytest.mark.parametrize("rows", [0, 3])
def test_an_estimate_ends_soon_although_the_chunk_ends_within_a_long_line(tmp_path, rows):
    """A search that begins anew at each letter of an unfinished line took minutes of a MiB."""
    line = json.dumps({"prompt": "p", "response": "r" * (texts.CHUNK // 4)})
    long = json.dumps({"prompt": "p", "response": "r" * 2 * texts.CHUNK})
    (tmp_path / "a.jsonl").write_text("\n".join([line] * rows + [long]))
    begun = time.process_time()
    assert 1 <= (sources.estimate_rows([str(tmp_path / "a.jsonl")]) or 0) <= 12
    assert time.process_time() - begun < 5


def test_what_is_no_object_in_an_array_is_a_row_without_content(tmp_path):
    (tmp_path / "a.json").write_text('[1, {"prompt": "p"}, "x", [2], null]')
    assert [row.content for row in rows_of(tmp_path / "a.json")].count(None) == 4
    (tmp_path / "a.json").write_text('[{"prompt": "p"}, {"pro')
    with pytest.raises(DataError, match=r"a\.json: the array has no end; the file was cut off"):
        rows_of(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_the_cure(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_text(LINE, encoding=encoding)
    with pytest.raises(DataError, match=r"a\.jsonl: is UTF-16; write it as UTF-8: iconv"):
        split([str(tmp_path / "a.jsonl")])


def test_a_compressed_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(LINE.encode())
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        split([str(tmp_path / "a.jsonl.gz")])


def test_a_row_of_csv_with_too_many_cells_has_no_content(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response,rejected\n"a\nb",c,\na,b,c,d\n')
    good, bad = rows_of(tmp_path / "a.csv")
    assert (good.content, bad.content) == ({"prompt": "a\nb", "response": "c"}, None)


PART = pa.struct([("role", pa.string()), ("content", pa.large_string())])
VIEWS = pa.list_view(pa.struct([("role", pa.string_view()), ("content", pa.string_view())]))


@pytest.mark.parametrize(
    ("kind", "messages"),
    [("parquet", pa.large_list(PART)), ("stream", pa.list_(PART)), ("stream", VIEWS), ("file", VIEWS)],
)
def test_nested_large_and_view_types_are_read(tmp_path, kind, messages):
    """Rows of one column as ``messages``, of another as a view of texts."""
    rows = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "r"}] for n in range(5)]
    prompts = pa.array(list("abcde"), pa.string_view())
    table = pa.table({"id": range(5), "prompt": prompts, "messages": pa.array(rows, messages)})
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(path, table.schema) as writer:
            for number in (0, 2, 4):
                writer.write_table(table.slice(number, 2))
    found = rows_of(path)
    assert [row.content for row in found] == [
        {"prompt": prompt, "messages": row} for prompt, row in zip("abcde", rows, strict=True)
    ]
    assert found[4].origin == f"{path}: row 4" and found[0].unread == ("id",)


def test_keys_that_arrow_adds_to_tool_calls_are_taken_away(tmp_path):
    tools = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    pq.write_table(pa.table({"messages": [[]], "tools": [tools]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet")[0].content["tools"] == tools


def saved(folder, rows, name="data-00000-of-00001.arrow"):
    """Writes what ``datasets.save_to_disk`` writes."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(folder / name, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_indices_data_files": None}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1.arrow").write_text("of a map()")
    return folder


def test_a_saved_dataset_is_read_and_one_of_several_splits_must_be_named(tmp_path):
    train = saved(tmp_path / "all" / "train", EVERY)
    saved(tmp_path / "all" / "test", EVERY[:1])
    assert [row.content for row in rows_of(*find_files(str(train)))] == EVERY
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"all: holds the splits train, test; name one, e\.g\. .*/all/train"):
        find_files(str(tmp_path / "all"))
    (train / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}')
    with pytest.raises(DataError, match="save it again after flatten_indices"):
        find_files(str(train))


def test_files_of_a_folder_that_are_no_data_are_listed(folder):
    assert skipped_files(".") == [str(folder / "notes.txt")]
    assert skipped_files("a.jsonl") == skipped_files("*.jsonl") == []
