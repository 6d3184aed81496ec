"""Files as people have them: read right, refused in one line with the cure, or in quarantine with the reason."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from datetime import date
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_ray.errors import UserError
from spin_ray.inputs import messages, prompt_rows
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.sources import find_files, read_slice, skipped_files, split
from tests.unit.inputs.test_prompt_rows import chat, task_of

ROW, OTHER = '{"prompt": "q", "response": "a"}', '{"prompt": "r", "response": "b"}'
GOOD = ["a", "b"]


def read(source: Path, **data) -> list[str]:
    """Returns the response of each row, or why it is refused."""
    rows = [row for piece in split(find_files(str(source))) for row in read_slice(piece, data.get("columns", ()))]
    found = prompt_rows.rows_of(rows, task_of(**data))
    return [
        f"{each.reason}: {each.detail}"
        if isinstance(each, Unusable)
        else json.loads(each[-1]["messages"])[-1]["content"]
        for each in found
    ]


def tar(text: str) -> bytes:
    """Returns an archive with one file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(text.encode())
        archive.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


FILES = {
    "an array called .jsonl": ("a.jsonl", f"[{ROW}, {OTHER}]", GOOD),
    "an array over lines, with a comma at its end": ("a.jsonl", f"[\n {ROW},\n {OTHER},\n]\n", GOOD),
    "a suffix in capitals": ("A.JSONL.GZ", gzip.compress(f"{ROW}\n{OTHER}".encode()), GOOD),
    "gzip in two parts": ("a.jsonl.gz", gzip.compress(f"{ROW}\n".encode()) + gzip.compress(OTHER.encode()), GOOD),
    "two files with byte order marks, joined": ("a.jsonl", f"\ufeff{ROW}\n\ufeff{OTHER}\n", GOOD),
    "blank lines": ("a.jsonl", f"\n\n{ROW}\r\n   \n{OTHER}\n\n", GOOD),
    "lines of arrays": ("a.json", f"[{ROW}]\n[{OTHER}]\n", ["malformed: not a JSON object but of type list"] * 2),
    "an empty array": ("a.json", "[]", "holds no rows"),
    "two arrays": ("a.json", f"[\n{ROW}]\n[{OTHER}]\n", "goes on behind its array; write an object a line"),
    "an object over lines": ("a.json", '{\n  "prompt": "q",\n  "response": "a"\n}', "has an object over several lines"),
    "an object that goes on": ("a.jsonl", '{"prompt": "q",\n "response": "a"}\n', "jq -c '.' FILE > NEW.jsonl"),
    "an object over lines, compressed": ("a.json.gz", gzip.compress(f'{{\n{ROW[1:]}'.encode()), "over several lines"),
    "rows under a key": ("a.json", f'{{"data": [{ROW}]}}', ["malformed: its rows are inside it; write them alone, one "
                         "a line: jq -c '.data[]' FILE > NEW.jsonl"]),
    "rows of the hub's server": ("a.json", f'{{"rows": [{{"row_idx": 0, "row": {ROW}}}]}}', ["malformed: its rows are "
                                 "inside it; write them alone, one a line: jq -c '.rows[].row' FILE > NEW.jsonl"]),
    "rows under a key, over lines": ("a.json", f'{{\n "version": 1,\n "data": [\n {ROW}]}}', "jq -c '.data[]' FILE"),
    "rows under a key that is no word": ("a.json", f'{{"train-data": [{ROW}]}}', ["malformed: its rows are inside it; "
                                         "write them alone, one a line: jq -c '.\"train-data\"[]' FILE > NEW.jsonl"]),
    "rows under a key with a quote, over lines": ("a.json", f'{{\n"it\'s": [\n {ROW}]}}', "'.\"it\\u0027s\"[]' FILE"),
    "a damaged first line": ("a.jsonl", f'{ROW} {{x\n{OTHER}\n',
                             ["malformed: not a JSON object (Extra data at character 34)", "b"]),
    "a carriage return in the first line": ("a.jsonl", f'{ROW}\r{{x\n{OTHER}\n',
                                            ["malformed: not a JSON object (Extra data at character 34)", "b"]),
    "a first line that is cut off": ("a.jsonl", f'[1,\n2]\n{ROW}\n', [
        "malformed: not a JSON object (Expecting value at character 4)",
        "malformed: not a JSON object (Extra data at character 2)", "a"]),
    "objects without line ends": ("a.jsonl", ROW + OTHER, "has several objects on a line"),
    "lines of old Macs": ("a.jsonl", f"{ROW}\r{OTHER}", "end with a carriage return alone"),
    "commas behind several lines": ("a.jsonl", f"{ROW},\n{OTHER}\n", "has a comma behind its objects"),
    "commas behind the lines": ("a.jsonl", f"{ROW},\n", ["malformed: not a JSON object (Extra data at character 33)"]),
    "a key twice": ("a.jsonl", '{"prompt": "q", "prompt": "r", "response": "a"}',
                    ["malformed: not a JSON object (has the key 'prompt' twice)"]),
    "latin-1": ("a.jsonl", '{"prompt": "é", "response": "a"}'.encode("latin-1"),
                ["malformed: not UTF-8 (byte 0xe9); write the file as UTF-8: iconv -f ENCODING -t UTF-8"]),
    "UTF-32": ("a.jsonl", ROW.encode("utf-32"), "is UTF-32; write it as UTF-8: iconv -f UTF-32"),
    "gzip without the suffix": ("a.jsonl", gzip.compress(ROW.encode()), "is gzip; its name must end with .gz"),
    "gzip twice": ("a.jsonl.gz", gzip.compress(gzip.compress(ROW.encode())), "is gzip; its name must end"),
    "Parquet called .jsonl": ("a.jsonl", b"PAR1\0\0", "is Parquet; its name must end with .parquet"),
    "a pointer of Git LFS": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "fetch it by git lfs pull"),
    "a web page": ("a.jsonl", "<!DOCTYPE html>\n<html>", "is a web page; download the file itself"),
    "a Parquet file cut off": ("a.parquet", b"PAR1\0\0\0\0\0\0\0\0", "is not a Parquet file (Parquet magic bytes"),
    "CSV with blank lines": ("a.csv", "\n\nprompt,response\n\nq,a\n", ["a"]),
    "CSV with semicolons": ("a.csv", "prompt;response\nq;a\n", "its columns are parted by ';'"),
    "TSV with commas": ("a.tsv", "prompt,response\nq,a\n", "its columns are parted by ','"),
    "CSV with a column twice": ("a.csv", "prompt,prompt,response\nq,r,a\n", "has the column prompt twice"),
    "CSV in single quotes": ("a.csv", "prompt,response\n'q','a'\n",
                             ["malformed: its cells are in single quotes; CSV has double ones"]),
    "tabs in a text": ("a.tsv", "prompt\tresponse\nq\ta\tx\nr\tb\n", ["malformed: has 3 cells, the header 2", "b"]),
    "quotes in a text": ("a.tsv", 'prompt\tresponse\n"Hi" he said\ta\n', "cannot be read near line 3"),
    "a quote without an end": ("a.csv", 'prompt,response\n"q,a\nr,b\n', "unexpected end of data"),
    "CSV with quoted semicolons": ("a.csv", '"prompt";"response"\n"q, r";"a"\n', "its columns are parted by ';'"),
    "a comma in a header of semicolons": ("a.csv", "id;prompt;x, y\n1;q;a\n", "its columns are parted by ';'"),
    "semicolons in a name of CSV": ("a.csv", "prompt,response,notes (a; b; c; d)\nq,a,n\n", ["a"]),
    "commas in a name of TSV": ("a.tsv", "prompt\tresponse, short, or, long\tresponse\nq\tx\ta\n", ["a"]),
    "bars in a name of CSV": ("a.csv", "prompt,a|b|c|d,response\nq,x,a\n", ["a"]),
    "CSV with its header again": ("a.csv", "prompt,response\nq,a\nprompt,response\nr,b\n",
                                  ["a", "malformed: is the header again", "b"]),
    "JSON lines called .csv": ("a.csv", f"{ROW}\n", "is JSON; its name must end with .jsonl"),
    "an array called .csv": ("a.csv", f"[{ROW}]", "is JSON; its name must end with .json"),
    "xz": ("a.jsonl.xz", lzma.compress(ROW.encode()), "is xz; unpack it"),
    "bzip2": ("a.jsonl.bz2", bz2.compress(ROW.encode()), "is bzip2; unpack it"),
    "gzip under its own name": ("a.jsonl.gzip", gzip.compress(ROW.encode()), "is gzip; its name must end with .gz"),
    "zstd under its own name": ("a.jsonl.zstd", pa.compress(ROW.encode(), "zstd", asbytes=True), "must end with .zst"),
    "compressed Parquet": ("a.parquet.gz", gzip.compress(b"PAR1"), "is compressed; unpack it"),
    "Parquet of another name": ("a.pq", b"PAR1\0\0", "is Parquet; its name must end with .parquet"),
    "Feather": ("a.feather", b"ARROW1\0\0", "is Arrow; its name must end with .arrow"),
    "JSON lines of another name": ("a.jsonlines", f"\ufeff{ROW}\n", "is JSON; its name must end with .jsonl"),
    "JSON lines as plain text": ("a.txt", ROW, "is JSON; its name must end with .jsonl"),
    "an array as plain text": ("a.txt", f"[{ROW}]", "is JSON; its name must end with .json"),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04", "is a table of a spreadsheet; save it as CSV"),
    "plain text": ("a.txt", "hello", "unknown kind of data file; expected one of .jsonl"),
    "nothing, of no kind": ("a.txt", "", "unknown kind of data file; expected one of .jsonl"),
    "CSV of Excel": ("a.csv", "\ufeffsep=,\r\nprompt,response\r\nq,a\r\n", "tail -n +2 FILE > NEW.csv"),
    "a tar archive": ("a.jsonl", tar(f"{ROW}\n"), "is a tar archive; unpack it"),
    "a tar archive, compressed": ("a.jsonl.gz", gzip.compress(tar(f"{ROW}\n")), "is a tar archive; unpack it"),
    "a web page in small letters": ("a.jsonl", "<!doctype html>\n<html>", "is a web page; download the file itself"),
    "rows of LMFlow": ("a.json", '{"type": "text2text", "instances": [{"input": "q", "output": "a"}]}', [
        "malformed: its rows are inside it; write them alone, one a line: jq -c '.instances[]' FILE > NEW.jsonl"]),
    "rows under two keys": ("a.json", f'{{"data": {{"rows": [{ROW}]}}}}', [
        "malformed: its rows are inside it; write them alone, one a line: jq -c '.data.rows[]' FILE > NEW.jsonl"]),
    "rows by number": ("a.json", f'{{"0": {ROW}, "1": {OTHER}}}', [
        "malformed: its rows are inside it; write them alone, one a line: jq -c '.[]' FILE > NEW.jsonl"]),
    "OpenAI's batches": ("a.jsonl", '{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "q"}]}}', [
        "malformed: its rows are inside it; write them alone, one a line: jq -c '.body' FILE > NEW.jsonl"]),
    "messages as JSON text": ("a.csv", 'prompt,chosen\n"[{""role"": ""user"", ""content"": ""q""}]",'
                              '"[{""from"": ""gpt"", ""value"": ""a""}]"\n', ["a"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_or_refused_with_the_cure(tmp_path, name):
    file, content, expected = FILES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        assert read(tmp_path / file) == expected
        return
    with pytest.raises(UserError) as caught:
        read(tmp_path / file)
    assert expected in str(caught.value) and file in str(caught.value) and "\n" not in str(caught.value)


TURNS = [("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]
DAYS = pa.array([[(date(2020, 1, 1), "x")]], pa.map_(pa.date32(), pa.string()))
STRUCTS = pa.array([[({"x": 1}, "x")]], pa.map_(pa.struct([("x", pa.int32())]), pa.string()))
CURE = (
    "malformed: needs messages, or prompt and response, or the columns of another form (docs/data.md); try "
    'data.columns: {prompt: "Prompt", response: "Response"}'
)
COLUMNS = {
    "messages of maps": ({"messages": pa.array([list(TURNS)], pa.list_(pa.map_(pa.string(), pa.string())))}, ["a"]),
    "NaN beside texts": ({"instruction": ["q"], "output": ["a"], "answer": [float("nan")]}, ["a"]),
    "a struct that is null": ({"conversations": [[{"from": "human", "value": "q"}, None]]},
                              [f"malformed: message 1: needs a role of {messages._ROLES}, found NoneType"]),
    "maps by day": ({"prompt": ["q"], "response": ["a"], "answer": DAYS}, ["a"]),
    "maps by day, unread": ({"Prompt": ["q"], "Response": ["a"], "meta": DAYS}, [CURE]),
    "maps by bytes, unread": ({"Prompt": ["q"], "Response": ["a"], "meta": pa.array([[(b"k", "x")]], pa.map_(
        pa.binary(), pa.string()))}, [CURE]),
    "maps by struct, unread": ({"Prompt": ["q"], "Response": ["a"], "meta": STRUCTS}, [CURE]),
    "bytes": ({"prompt": [b"q"], "response": [b"a"]}, ["malformed: prompt: must be text, found bytes"]),
}  # fmt: skip


MESSAGE = [("role", pa.string()), ("content", pa.string()), ("created", pa.timestamp("ms"))]
SAID = [{"role": "user", "content": "q", "created": 2**60}, {"role": "assistant", "content": "a", "created": 0}]
STRANGE = {
    "a time past any": pa.table({"messages": pa.array([SAID], pa.list_(pa.struct(MESSAGE)))}),
    "a day before any": pa.table({"ask": ["q"], "day": pa.array([-(10**7)], pa.date32())}),
    "a map by struct": pa.table({"prompt": ["q"], "response": ["a"], "answer": STRUCTS}),
    "a map with a key twice": pa.table(
        {"messages": pa.array([[[("role", "user"), ("role", "x")]]], pa.list_(pa.map_(pa.string(), pa.string())))}
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_values_that_python_has_none_for_are_one_line(tmp_path, name):
    pq.write_table(STRANGE[name], tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: holds what cannot be read near row 0") as caught:
        read(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("~nosuchuser/a.jsonl", "no such data"), ("a\0b.jsonl", "it has a NUL"),
        ("a\nb.jsonl", "a b.jsonl: no such data"),
        ("$DATA/a.jsonl", "variables of the shell are not read"), ("{a,b}.jsonl", "several sources are a list"),
        ("a.jsonl,b.jsonl", "several sources are a list"), ("o/n.v2@main", "hf://datasets/o/n.v2@main/FILE"),
        ("https://huggingface.co/datasets/o/n/resolve/v1/d/a.jsonl", "it is hf://datasets/o/n@v1/d/a.jsonl"),
        ("https://huggingface.co/datasets/o/n", "it is hf://datasets/o/n/FILE"),
        ("https://huggingface.co/datasets/o/n/resolve/main/a.csv?download=true", "it is hf://datasets/o/n@main/a.csv"),
        ("https://huggingface.co/datasets/o/n/viewer/default/train", "it is hf://datasets/o/n/FILE"),
        ("https://huggingface.co/datasets/o/n/blob/refs%2Fconvert%2Fparquet/d/0.parquet#L3",
         "it is hf://datasets/o/n@refs/convert/parquet/d/0.parquet"),
    ],
)  # fmt: skip
def test_a_path_that_is_none_is_one_line_with_a_hint(source, hint):
    with pytest.raises(UserError) as caught:
        find_files(source)
    assert hint in str(caught.value) and "\n" not in str(caught.value)
    assert "?" not in str(caught.value).rpartition("hf://")[2], "what follows in a link is no part of the name"


def test_a_file_that_is_missing_is_no_name_of_the_hub():
    with pytest.raises(UserError, match="no such data") as caught:
        find_files("data/train.jsonl")
    assert "hub" not in str(caught.value)


def test_a_file_uri_may_hold_blanks_and_letters_as_they_are_or_written_as_bytes(tmp_path):
    path = tmp_path / "a b é.jsonl"
    path.write_text(ROW)
    for uri in (f"file://{path}", f"file://localhost{quote(str(path))}"):
        assert read(uri) == ["a"]


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_parquet_are_read_or_refused_by_name(tmp_path, name):
    columns, expected = COLUMNS[name]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == expected


def test_a_parquet_file_with_a_damaged_name_of_a_column_is_refused(tmp_path):
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"]}), tmp_path / "a.parquet", store_schema=False)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"response", b"respons\xa1"))
    with pytest.raises(UserError, match=r"is not a Parquet file \('utf-8' codec"):
        read(tmp_path / "a.parquet")


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    texts = [pa.array(["x"])] * 3
    pq.write_table(pa.Table.from_arrays(texts, ["prompt", "prompt", "response"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has the column prompt twice"):
        read(tmp_path / "a.parquet")


def test_what_programs_leave_in_a_folder_is_no_data_and_globs_are_those_of_a_shell(tmp_path):
    for name in ("a.jsonl", "sub/b.jsonl", ".ipynb_checkpoints/a.jsonl", "._a.jsonl", "_delta_log/0.json", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROW)
    data = [str(tmp_path / "a.jsonl"), str(tmp_path / "sub/b.jsonl")]
    assert find_files(str(tmp_path)) == find_files(f"{tmp_path}/**/*.jsonl") == data
    assert skipped_files(str(tmp_path)) == [str(tmp_path / "_delta_log/0.json")]
    assert find_files(f"{tmp_path}/?.json[!x]") == find_files(f"{tmp_path}/[a-b].*") == data[:1]
    (tmp_path / "[a].jsonl").write_text(ROW)
    assert find_files(f"{tmp_path}/[a].jsonl") == [str(tmp_path / "[a].jsonl")]


def test_a_folder_of_several_splits_is_refused_and_one_of_them_taken(tmp_path):
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/train_2.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROW)
    for source in (tmp_path, f"{tmp_path}/**/*", f"file://{tmp_path}/*/*.jsonl"):
        with pytest.raises(
            UserError, match=r"several splits \(test, train\); .*; name one, e\.g\. .*/data/train\*$"
        ) as caught:
            find_files(str(source))
        assert len(find_files(str(caught.value).partition("e.g. ")[2])) == 2
    assert [Path(file).name for file in find_files(f"{tmp_path}/**/train*")] == [
        "train-00000-of-00001.jsonl",
        "train_2.jsonl",
    ]


def test_a_relative_glob_over_several_splits_is_refused(tmp_path, monkeypatch):
    """Training would learn the test rows without a word. The folders above the wildcard tell of no split."""
    monkeypatch.chdir(written(tmp_path, ("train/test-0", "train/train-0", "test-1")))
    with pytest.raises(UserError, match=r"^\*/\*\.jsonl: holds .* e\.g\. train/train-0\.jsonl$"):
        find_files("*/*.jsonl")
    assert len(find_files("train/test*")) == len(find_files("*.jsonl")) == 1


@pytest.mark.parametrize("names", [("split=train/0.jsonl", "split=test/0.jsonl"), ("train.jsonl", "heldout.jsonl")])
def test_splits_of_partitions_and_of_our_own_names_are_told(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROW)
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        find_files(str(tmp_path))


SPLITS = [
    ("train1", "test1"), ("train 1", "test 1"), ("train2024", "val2024"),
    ("training", "testing"), ("train", "evaluation"), ("sft_train_10k", "sft_test1k"), ("train/0", "test/0"),
    ("my-train-v2", "my-eval-v2"), ("a.train", "a.dev"), ("Train/0", "Dev 2/0"),
]  # fmt: skip
"""Two files that ``datasets`` takes for two splits."""


def written(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text(ROW)
    return folder


@pytest.mark.parametrize("names", [*SPLITS, ("train(1)", "test(1)"), ("train@1", "test@1"), ("train[1]", "dev[1]"),
    ("train", "held-out"), ("trainset", "testset"), ("traindata", "testdata")])  # fmt: skip
def test_files_of_two_splits_are_not_joined(tmp_path, names):
    with pytest.raises(UserError, match="several splits") as caught:
        find_files(str(written(tmp_path, names)))
    proposed = str(caught.value).partition("e.g. ")[2]
    assert find_files(proposed) == [str(tmp_path / f"{names[0]}.jsonl")]


@pytest.mark.parametrize(
    ("names", "said", "taken"),
    [
        (["main/train-0", "main/test-0", "socratic/train-0"], "main/train, socratic/train", ["main/train-0"]),
        (["main/train-0", "main/train-1", "main/test-0", "more/train-0"], "main/train, more/train",
         ["main/train-0", "main/train-1"]),
        (["data/train_gen-00000-of-00002", "data/train_gen-00001-of-00002", "data/train_sft-00000-of-00002-ab1",
          "data/train_sft-00001-of-00002-ab2", "data/train_prefs", "data/test_sft-00000-of-00001"],
         "data/train_gen, data/train_prefs, data/train_sft",
         ["data/train_sft-00000-of-00002-ab1", "data/train_sft-00001-of-00002-ab2"]),
        (["a/train/0", "a/train/1", "a/test/0", "b/train/0"], "a/train, b/train", ["a/train/0", "a/train/1"]),
        (["train", "train_hard", "test"], "train, train_hard", ["train"]),
    ],
    ids=["GSM8K", "numbers", "UltraFeedback", "folders", "words"],
)  # fmt: skip
def test_the_proposed_files_of_a_split_are_those_of_one_configuration(tmp_path, names, said, taken):
    for name in names:
        (tmp_path / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(ROW)
    with pytest.raises(UserError, match="several splits") as caught:
        find_files(str(tmp_path))
    assert f"in several configurations ({said})" in str(caught.value)
    proposed = str(caught.value).partition("e.g. ")[2]
    assert find_files(proposed) == [str(tmp_path / f"{name}.jsonl") for name in taken]


@pytest.mark.parametrize("names", [("train", "latest"), ("train", "contest"), ("train", "device"), ("a", "protest_1"),
                                   ("train", "restraining"), ("train", "medieval"), ("train", "interval"),
                                   ("training_1", "train_2"), ("train", "evaluations_of_staff")])  # fmt: skip
def test_a_word_within_another_is_no_split(tmp_path, names):
    assert len(find_files(str(written(tmp_path, names)))) == 2


@pytest.mark.parametrize("names", [*SPLITS, ("train", "latest"), ("train", "contest"), ("training_1", "train_2")])
def test_splits_are_those_of_datasets(tmp_path, names, monkeypatch):
    """``load_dataset(FOLDER)`` finds them by the same words and the same bounds; letters may be small ones alone."""
    data_files = pytest.importorskip("datasets.data_files")
    names = tuple(name.lower() for name in names)
    theirs = data_files.get_data_patterns(str(written(tmp_path, names)))
    if len(theirs) > 1:
        with pytest.raises(UserError, match="several splits"):
            find_files(str(tmp_path))
    else:
        assert len(find_files(str(tmp_path))) == 2
    assert (len(theirs) > 1) == (names in [tuple(name.lower() for name in pair) for pair in SPLITS])


@pytest.mark.parametrize(
    ("name", "values"), [("label", [True, False]), ("system", ["s", "t"]), ("system_prompt", ["s", "t"])]
)
def test_a_column_in_the_names_of_folders_is_refused(tmp_path, name, values):
    """Hive's layout; a folder that the source itself names is the user's choice."""
    table = pa.table({"prompt": ["q", "r"], "completion": ["a", "b"], name: values})
    pq.write_to_dataset(table, tmp_path / "data", partition_cols=[name])
    for source in (tmp_path / "data", tmp_path / "data/*/*.parquet", tmp_path / "data/**/*.parquet"):
        with pytest.raises(UserError, match=f"{name}=.* holds the column {name} in its name, which is not read; write"):
            find_files(str(source))
    named = str(values[0]).lower() if isinstance(values[0], bool) else str(values[0])
    assert read(tmp_path / "data" / f"{name}={named}") == ["a"]


def test_a_column_that_no_form_reads_may_be_in_the_names_of_folders(tmp_path):
    pq.write_to_dataset(pa.table({"prompt": ["q"], "completion": ["a"], "lang": ["en"]}), tmp_path, ["lang"])
    assert read(tmp_path) == ["a"]


# Rows

CHAT = json.dumps(chat("q", "a"))
SPOKEN = json.dumps(chat("q", "a")[1:])
ROWS = {
    "LMSYS": ({"conversation": chat("q", "a"), "conversation_id": "x"}, "a"),
    "OpenOrca, mapped": ({"system_prompt": "s", "prompt": "q", "response": "a"}, "a"),
    "LLaMA-Factory": ({"instruction": "", "input": "q", "chosen": "a", "rejected": "b"}, "a"),
    "one message chosen": ({"prompt": "q", "chosen": {"role": "assistant", "content": "a"}}, "a"),
    "JSON text of messages": ({"prompt": json.dumps(chat("q")), "completion": "a"}, "a"),
    "JSON text of messages, both": ({"prompt": json.dumps(chat("q")), "completion": SPOKEN}, "a"),
    "JSON text that answers messages": ({"prompt": chat("q"), "completion": SPOKEN}, "a"),
    "a chat that was asked for": ({"prompt": "write a chat", "response": CHAT}, CHAT),
    "a message that was asked for": ({"prompt": "write a chat", "completion": SPOKEN}, SPOKEN),
    "a chat in Alpaca's columns": ({"instruction": "write a chat", "output": CHAT}, CHAT),
    "a chat that answers a question": ({"question": "write a chat?", "answer": CHAT}, CHAT),
    "a chat chosen over a text": ({"prompt": "write a chat", "chosen": CHAT, "rejected": "no"}, CHAT),
    "a text chosen over a chat": ({"prompt": "write no chat", "chosen": "ok", "rejected": CHAT}, "ok"),
    "a chat chosen, none rejected": ({"prompt": "write a chat", "chosen": CHAT, "rejected": None}, CHAT),
    "a chat chosen in Alpaca's columns": ({"instruction": "write", "chosen": CHAT, "rejected": "no"}, CHAT),
    "two messages as JSON text": ({"prompt": "q", "chosen": SPOKEN, "rejected": json.dumps(chat("q", "b")[1:])}, "a"),
    "two conversations as JSON text": ({"prompt": "q", "chosen": CHAT, "rejected": json.dumps(chat("q", "b"))}, "a"),
    "UltraFeedback as JSON text": ({"prompt": "q", "chosen": CHAT, "rejected": None}, "a"),
    "a conversation that the prompt is a part of": (
        {"prompt": "q", "chosen": json.dumps([{"role": "system", "content": "s"}, *chat("q", "a")])}, "a"
    ),
    "a conversation in ShareGPT's words": (
        {"prompt": "q", "chosen": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])}, "a"
    ),
    "one of two responses, beside messages": (
        {"prompt": json.dumps(chat("q")), "chosen": SPOKEN, "rejected": "b"}, "a"
    ),
    "a conversation as JSON text": ({"chosen": CHAT}, "a"),
    "a history as JSON text": ({"instruction": "q", "output": "a", "history": '[["x", "y"]]'}, "a"),
    "text that looks like JSON": ({"prompt": '[{"role": "admin"}]', "response": '["a"]'}, '["a"]'),
    "one role by two names": ({"messages": [chat("q")[0] | {"from": "human"}, *chat("q", "a")[1:]]}, "a"),
    "two answers": ({"instruction": "q", "output": ["a", "b"]}, "output: expected a text or messages, found a list"),
    "a number for a response": ({"prompt": "2 + 2", "response": 4}, "malformed: response: must be text, found int"),
    "a number for an output": ({"instruction": "2 + 2", "output": 4}, "malformed: output: must be text, found int"),
    "a number for an answer": ({"question": "2 + 2", "answer": 4}, "malformed: answer: must be text, found int"),
    "a list for a system": ({"messages": chat("q", "a"), "system": {"a": 1}}, "system: must be text, found dict"),
    "numbers in a history": ({"instruction": "q", "output": "a", "history": [["x", 4]]}, "pairs of texts, instruction"),
    "an unwanted response": ({"prompt": "q", "completion": "a", "label": False}, "rejected: label is false"),
    "a label of something else": ({"prompt": "q", "completion": "a", "label": 0}, "a"),
    "an unknown role": ({"messages": [{"role": "claude", "content": "x"}]}, "assistant, tool, found 'claude'"),
    "two roles": ({"messages": [{"role": "user", "from": "gpt", "content": "x"}]}, "has role and from, which differ"),
    "two contents": ({"messages": [{"role": "user", "content": "x", "value": "y"}]}, "content and value, which differ"),
    "a user without a word": ({"conversations": [*chat(" "), {"from": "gpt", "value": "a"}]}, "(user) has no text"),
    "a Python list as text": ({"messages": str(chat("q", "a"))}, "found str that is no JSON"),
    "capitals": ({"Prompt": "q", "Response": "a"}, 'try data.columns: {prompt: "Prompt", response: "Response"}'),
    "blanks": ({" prompt": "q", "response": "a"}, 'try data.columns: {prompt: " prompt"}'),
    "other words": ({"query": "q", "answer": "a"}, 'try data.columns: {prompt: "query", response: "answer"}'),
    "a solution beside its answer": ({"problem": "q", "solution": "a", "answer": "4"}, 'response: "solution"}'),
    "a role in blanks": ({"messages": [{"role": " User ", "content": "q"}, *chat("q", "a")[1:]]}, "a"),
    "keys of another name": ({"messages": [{"speaker": "user", "text": "q"}]}, "its keys are speaker, text"),
    "texts without speakers": ({"conversations": ["q", "a"]}, "message 0: is text without a speaker; write a role"),
    "SQuAD": ({"context": "c", "question": "q", "answers": {"text": ["a"]}}, "nearest is orca, which lacks chosen"),
    "a text of another name": ({"messages": [{"role": "user", "text": "q"}]}, "NoneType; its keys are role, text"),
    "a form in a column": ({"text": "x", "meta": {"prompt": "q", "response": "a"}}, "form (docs/data.md); data.col"),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a"}, '{input: "context", output: "response"}'),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_or_refused_by_what_is_wrong(tmp_path, name):
    row, expected = ROWS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (found,) = read(tmp_path / "a.jsonl")
    assert expected in found if " " in expected else expected == found
