"""The same rows give the same prompt rows, whether they come as JSONL or as Parquet."""

import json
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.inputs import prompt_rows
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.graders import answer_text
from spin_ray.inputs.sources import Slice, read_slice, split
from tests.unit.inputs.test_prompt_rows import chat, task_of, text_of

Row = dict[str, Any]
TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[Row], text: pa.DataType = TEXTS["string"], row_group: int = 2) -> Path:
    """Writes a column for each key of any row; a row that lacks the key has a null there, as all writers do."""
    conversation = pa.list_(pa.struct([("role", text), ("content", text), ("tool_calls", pa.list_(pa.string()))]))
    types = {"messages": conversation, "answer": pa.float64(), "score": pa.float64()}
    fields = []
    for name in dict.fromkeys(key for row in rows for key in row):
        nested = any(isinstance(row.get(name), list) for row in rows)
        fields.append((name, types.get(name, conversation if nested else text)))
    table = pa.table(
        [pa.array([row.get(name) for row in rows], kind) for name, kind in fields], schema=pa.schema(fields)
    )
    pq.write_table(table, path, row_group_size=row_group)
    return path


def found_in(path: Path, *, labelled: bool = True, **data: Any) -> list[list[Row] | tuple[str, str]]:
    """For each row of a file its prompt rows, or the reason why it cannot be used."""
    task = replace(task_of(**data), labelled=labelled)
    task.__dict__["renderer"] = task_of().renderer
    rows = [row for piece in split([str(path)]) for row in read_slice(piece)]
    found = prompt_rows.rows_of(rows, task)
    return [(each.reason, each.detail) if isinstance(each, Unusable) else each for each in found]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["a", "b", "<|im_end|>", " "])
chats = st.lists(texts, min_size=1, max_size=4).map(lambda each: chat(*each))
pairs_of_chats = st.tuples(chats, texts, texts).map(
    lambda found: {
        "chosen": [*found[0], {"role": "assistant", "content": found[1]}],
        "rejected": [*found[0], {"role": "assistant", "content": found[2]}],
    }
)
answers = st.none() | st.integers(-9, 9) | st.floats(-9, 9)


def lacking(**columns: st.SearchStrategy[Any]) -> st.SearchStrategy[Row]:
    """Rows that may lack any of the columns."""
    return st.fixed_dictionaries({}, optional=columns)


FORMS = {
    "messages": lacking(messages=chats, answer=answers.filter(lambda answer: answer is not None)),
    "prompt and response": lacking(prompt=texts, response=texts, score=st.floats(0, 9)),
    "prompt, chosen and rejected": lacking(prompt=texts, chosen=texts, rejected=texts),
    "chosen and rejected conversations": pairs_of_chats | lacking(chosen=chats, rejected=chats),
    "all columns of UltraFeedback": st.tuples(pairs_of_chats, lacking(prompt=texts, messages=chats)).map(
        lambda found: found[0] | found[1]
    ),
    "prompt only": lacking(prompt=texts),
    "messages here, prompt there": lacking(messages=chats) | lacking(prompt=texts, response=texts),
}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), text=st.sampled_from(sorted(TEXTS)), turns=st.sampled_from(["last", "first", "all"]))
def test_parquet_gives_the_prompt_rows_that_jsonl_gives(tmp_path_factory, form, data, text, turns):
    rows = data.draw(st.lists(FORMS[form], min_size=1, max_size=5))
    if not any({"messages", "prompt", "chosen"} & row.keys() for row in rows):
        rows.append({"prompt": "p", "response": "r"} if "prompt" in form else pairs_of_one())
    folder = tmp_path_factory.getbasetemp()
    lines = write_jsonl(folder / "a.jsonl", rows)
    columns = write_parquet(folder / "a.parquet", rows, TEXTS[text])
    for labelled in (True, False):
        assert found_in(columns, labelled=labelled, turns=turns) == found_in(lines, labelled=labelled, turns=turns)


def pairs_of_one() -> Row:
    return {"chosen": chat("a", "b"), "rejected": chat("a", "c")}


def test_ultrafeedback_has_its_pairs(tmp_path):
    """Columns as in HuggingFaceH4/ultrafeedback_binarized."""
    row = {"prompt": "2 + 2?", "prompt_id": "p0", "messages": chat("2 + 2?", "4"), "score_chosen": "8"}
    row |= {"chosen": chat("2 + 2?", "4"), "rejected": chat("2 + 2?", "5")}
    ((found,),) = found_in(write_parquet(tmp_path / "a.parquet", [row]))
    assert (text_of(found["real_ids"]), text_of(found["rejected_ids"])) == ("4<|im_end|>", "5<|im_end|>")


@pytest.mark.parametrize(
    "row", [pairs_of_one(), {"prompt": "a", "chosen": "b", "rejected": "c"}], ids=["conversations", "prompt and texts"]
)
def test_pairs_need_no_other_column(tmp_path, row):
    ((found,),) = found_in(write_parquet(tmp_path / "a.parquet", [row]))
    assert text_of(found["prompt_ids"]).startswith("<|im_start|>user\na<|im_end|>")
    assert (text_of(found["real_ids"]), text_of(found["rejected_ids"])) == ("b<|im_end|>", "c<|im_end|>")


def test_questions_need_a_prompt_only(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "why?"}])
    ((found,),) = found_in(path, labelled=False)
    assert text_of(found["prompt_ids"]).startswith("<|im_start|>user\nwhy?<|im_end|>")
    ((reason, detail),) = found_in(path)
    assert reason == "malformed"
    assert detail.startswith("needs messages, or prompt and response")


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = {
    "images": (pa.list_(IMAGE), [{"bytes": b"\x89PNG" * 9000, "path": None}], []),
    "image": (IMAGE, {"bytes": b"\x89PNG" * 9000, "path": "a.png"}, None),
    "videos": (pa.list_(pa.string()), ["a.mp4"], []),
    "audio": (pa.large_string(), "a.wav", ""),
    "video": (pa.bool_(), True, False),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_text_with_a_mark_is_refused_only_where_its_row_holds_what_stands_there(tmp_path, name):
    """Mixed sets have rows of text alone, in which the columns of images are null or empty."""
    kind, filled, empty = IMAGES[name]
    asked = [f"How do I embed a clip with <video>? {number}" for number in range(3)]
    table = pa.table(
        {"prompt": asked, "response": ["a"] * 3, name: pa.array([filled, empty, None], kind)},
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    rows = [json.loads(json.dumps(row, default=str)) for row in table.to_pylist()]
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet", tmp_path / "a.arrow"):
        refused, *used = found_in(path)
        assert refused == ("media", f"its text has <video>, and the model reads text alone (column {name})")
        assert [len(each) for each in used] == [1, 1] and used[0][0]["real_ids"], path.suffix


def test_a_column_of_bytes_is_not_read_and_counts_as_filled(tmp_path):
    table = {"prompt": ["<image>?", "q"], "response": ["a", "b"], "image": [b"\x89PNG", None]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [row.unread for row in read_slice(Slice(str(tmp_path / "a.parquet"), 0, 1))] == [("image",)] * 2


CALLS = [
    {"name": "weather", "arguments": {"city": "Rome"}},
    {"name": "date", "arguments": {"day": 1, "zones": [{"a": 1}, None]}},
]
SPELT = {
    "function_call": [
        {"messages": [*chat("q"), {"role": "assistant", "content": "", "function_call": call}, *chat("a")]}
        for call in CALLS
    ],
    "tool_calls": [
        {"messages": [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}, *chat("a")]}
        for call in CALLS
    ],
    "messages in lists": [
        {"messages": {"role": ["user", "assistant"], "content": ["q", ""], "function_call": [None, call]}}
        for call in CALLS
    ],
    "tools": [{"messages": chat("q", "a"), "tools": [call]} for call in CALLS],
    "tools by another name": [{"messages": chat("q", "a"), "offered": [call]} for call in CALLS],
    "an answer": [{"messages": chat("q", "a"), "answer": {"city": "Rome", "day": None}}],
    "an answer by another name": [{"messages": chat("q", "a"), "value": {"city": "Rome", "day": None}}],
}
COLUMNS = {"tools by another name": {"tools": "offered"}, "an answer by another name": {"answer": "value"}}


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
@pytest.mark.parametrize("spelling", SPELT)
def test_the_nulls_of_arrow_are_in_no_call_and_those_of_an_answer_stay(tmp_path, spelling, kind):
    """Rows weather(city) and date(day) have one struct type, and so a null for the other's argument."""
    rows, columns = SPELT[spelling], COLUMNS.get(spelling, {})
    table = pa.Table.from_pylist(rows)
    if kind == ".parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
            stream.write_table(table)
    task = task_of(columns=columns)

    def read(path: Path) -> list[Any]:
        pieces = split([str(path)])
        found = [prompt_rows._found_in(row, task) for each in pieces for row in read_slice(each, columns)]
        return [(each.all, each.tools, answer_text(each.row.get("answer"))) for each in found]

    assert read(tmp_path / f"a{kind}") == read(write_jsonl(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("key", "kind", "text"),
    [(date(2020, 1, 1), pa.date32(), "2020-01-01"), (b"k", pa.binary(), "k"), (7, pa.int32(), "7"), ("k", None, "k")],
)
def test_keys_of_maps_are_texts_as_in_json(tmp_path, key, kind, text):
    column = pa.array([[[(key, "x")]], None], pa.list_(pa.map_(kind or pa.string(), pa.string())))
    pq.write_table(pa.table({"prompt": ["p"] * 2, "response": ["r"] * 2, "answer": column}), tmp_path / "a.parquet")
    first, second = (row for piece in split([str(tmp_path / "a.parquet")]) for row in read_slice(piece))
    assert first.content == json.loads(first.raw) == {"prompt": "p", "response": "r", "answer": [{text: "x"}]}
    assert "answer" not in second.content


_ID = "12345678-1234-5678-1234-567812345678"


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("value", "of", "in_json"),
    [
        (Decimal("1.50"), pa.decimal128(9, 2), 1.5),
        (Decimal("12.00"), pa.decimal128(9, 2), 12),
        (Decimal(2**70), pa.decimal128(38, 0), 2**70),
        ([Decimal("1.50"), None], pa.list_(pa.decimal128(9, 2)), [1.5, None]),
        ({"day": date(2020, 1, 1)}, pa.struct([("day", pa.date32())]), {"day": "2020-01-01"}),
        (date(2020, 1, 1), pa.date32(), "2020-01-01"),
        (datetime(2020, 1, 1, 12), pa.timestamp("us"), "2020-01-01 12:00:00"),
        (UUID(_ID).bytes, pa.uuid(), _ID),
    ],
)  # fmt: skip
def test_decimals_dates_and_uuids_are_read_as_from_json(tmp_path, value, of, in_json, kind):
    """A grader compares the answer's text, and a conversation's parts are found by its name."""
    column = (
        pa.array([value], of)
        if of != pa.uuid()
        else pa.ExtensionArray.from_storage(of, pa.array([value], pa.binary(16)))
    )
    table = pa.table({"prompt": ["p"], "response": ["r"], "answer": column, "conversation_id": column})
    if kind == ".parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
            stream.write_table(table)
    row = {"prompt": "p", "response": "r", "answer": in_json, "conversation_id": in_json}
    assert found_in(tmp_path / f"a{kind}") == found_in(write_jsonl(tmp_path / "a.jsonl", [row]))
