"""Forms of rows: a conversation written in any of them has the same tokens, and nothing is dropped unsaid."""

import copy
import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.config.sections import DataConfig, FormName
from spin_ray.errors import DataError
from spin_ray.inputs import prompt_rows
from spin_ray.inputs.conversations import Found, Unusable, conversations_of, question_of, read_row
from spin_ray.inputs.forms import BY_NAME, FORMS, find_form, form_of, ignored_in, mapped
from spin_ray.inputs.messages import parse_messages
from spin_ray.inputs.rendering import ChatRenderer
from spin_ray.inputs.sources import SourceRow, read_slice, split
from tests.unit.inputs.test_prompt_rows import TOKENIZER, chat, rows_of, task_of

DATA = DataConfig(train="d")


def written(asked, said, worse, system):
    """One exchange in every way in which files hold it."""
    before = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": asked}]
    after, bad = [{"role": "assistant", "content": said}], [{"role": "assistant", "content": worse}]
    shared = [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
              for m in before + after]  # fmt: skip
    beside = {"system": system} if system else {}
    return {
        "messages": {"messages": before + after, "prompt": "not read"},
        "JSON text": {"messages": json.dumps(before + after)},
        "messages, system beside": {"messages": [m for m in before + after if m["role"] != "system"], **beside},
        "struct of lists": {"messages": {key: [m[key] for m in before + after] for key in ("role", "content")}},
        "parts": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in before + after]},
        "nulls": {"messages": [m | {"tool_calls": None, "name": None} for m in before + after]},
        "sharegpt": {"conversations": shared},
        "sharegpt, system beside": {"conversations": [m for m in shared if m["from"] != "system"], **beside},
        "alpaca": {"instruction": asked, "input": "", "output": said, **beside},
        "prompt_response": {"prompt": asked, "response": said, **beside},
        "prompt_completion": {"prompt": asked, "completion": said, **beside},
        "prompt_completion of messages": {"prompt": before, "completion": after},
        "question_answer": {"question": asked, "answer": said, **beside},
        "TRL implicit": {"chosen": before + after, "rejected": before + bad},
        "TRL explicit": {"prompt": before, "chosen": after, "rejected": bad},
        "UltraFeedback": {"prompt": asked, "chosen": before + after, "rejected": before + bad, "messages": before},
        "texts": {"prompt": asked, "chosen": said, "rejected": worse, **beside},
        "orca": {"question": asked, "chosen": said, "rejected": worse, **beside},
        "SPIN's authors": {"real": before + after, "generated": before + bad},
        "TRL implicit, system beside": {"chosen": before[-1:] + after, "rejected": before[-1:] + bad, **beside},
    }


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=15, deadline=None)
@given(words, words, words, st.none() | words)
def test_a_conversation_written_in_every_form_has_the_same_token_ids(asked, said, worse, system):
    ways = written(asked, said, worse, system)
    task = task_of(max_length=512)
    (expected,) = rows_of(ways["messages"], task)
    (pair,) = rows_of(ways["texts"], task)
    for name, row in ways.items():
        (found,) = rows_of(row, task)
        for column in ("prompt_ids", "real_ids", "messages"):
            assert found[column] == expected[column], name
        assert found["rejected_ids"] == (pair["rejected_ids"] if {"rejected", "generated"} & row.keys() else None)


def as_file(path, row):
    """Writes a row as a file of the kind that the name says; in CSV and TSV lists are JSON text."""
    row = {name: value for name, value in row.items() if value is not None}
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
            writer.writerows([row, cells])
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist([row])
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        text = json.dumps(row if path.suffix == ".jsonl" else [row], ensure_ascii=path.suffix == ".json")
        path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
@settings(max_examples=3, deadline=None)
@given(asked=words, said=words, worse=words, system=st.none() | words)
def test_every_form_has_the_same_token_ids_in_every_kind_of_file(tmp_path_factory, kind, asked, said, worse, system):
    ways = written(asked, said, worse, system)
    (expected,) = rows_of(ways["messages"], task_of(max_length=512))
    rows = [
        next(read_slice(split([str(as_file(tmp_path_factory.getbasetemp() / f"a.{kind}", way))])[0]))
        for way in ways.values()
    ]
    for name, found in zip(ways, prompt_rows.rows_of(rows, task_of(max_length=512)), strict=True):
        assert not isinstance(found, Unusable), (name, found.detail)
        assert [found[0][column] for column in ("prompt_ids", "real_ids")] == [
            expected[column] for column in ("prompt_ids", "real_ids")
        ], name


def test_every_form_reads_its_own_example_and_no_other_form_takes_it():
    assert set(BY_NAME) == set(FormName.__args__)
    for form in FORMS:
        assert form_of(form.example, DATA) is form
        assert ignored_in(form.example, form) == []
        (conversation,) = conversations_of(form.example, DATA)
        assert conversation[-1] == {"role": "assistant", "content": conversation[-1]["content"]}
        assert "4" in conversation[-1]["content"]


def test_alpaca_joins_instruction_and_input_and_puts_the_history_first():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["hi", "hello"]]}
    assert conversations_of(row, DATA) == [chat("hi", "hello", "Add.\n\n2, 2", "4")]


def test_columns_are_mapped_and_a_form_can_be_named():
    data = DataConfig(train="d", columns={"prompt": "q", "response": "a"})
    assert conversations_of({"q": "x", "a": "y"}, data) == [chat("x", "y")]
    both = {"messages": chat("a", "b"), "instruction": "x", "output": "y"}
    assert conversations_of(both, DataConfig(train="d", form="alpaca")) == [chat("x", "y")]
    assert ignored_in(both, BY_NAME["alpaca"]) == ["messages"]
    with pytest.raises(Unusable) as caught:
        conversations_of({"messages": chat("a", "b")}, DataConfig(train="d", form="alpaca"))
    assert caught.value.detail == "data.form alpaca needs instruction, output; there is no instruction, output"


@pytest.mark.parametrize(
    "row", [{"instruction": "why?"}, {"question": "why?"}, {"prompt": chat("why?")}, {"prompt": "why?", "chosen": "so"}]
)
def test_a_question_may_be_in_any_form(row):
    assert question_of(row, DATA).ending_with_real == [chat("why?", "")]


def test_columns_beside_every_form_are_mapped_too():
    weather = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": "x", "response": "y", "gold": "7", "functions": weather}
    (made,) = rows_of({**row, "functions": None}, task_of(columns={"answer": "gold", "tools": "functions"}))
    assert made["answer_text"] == "7"
    assert read_row(row, DataConfig(train="d", columns={"tools": "functions"})).tools == weather


def test_rows_with_tools_are_refused_where_they_would_be_written_again_without():
    task = replace(task_of(), takes_tools=False)
    task.__dict__["renderer"] = task_of().renderer
    with pytest.raises(Unusable) as caught:
        rows_of({"prompt": "x", "response": "y", "tools": [{"type": "function"}]}, task)
    assert caught.value.reason == "tools"


LONE = "\ud800"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "response": "y", "answer": LONE},
        {"prompt": "x", "response": "y", "tools": [{"name": LONE}]},
        {"messages": [*chat("x"), {"role": "assistant", "content": "y", "reasoning_content": LONE}]},
        {"messages": [*chat("x"), {"role": "assistant", "content": "", "tool_calls": [{"name": LONE}]}]},
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(row):
    with pytest.raises(Unusable) as caught:
        rows_of(row)
    assert "not valid Unicode" in caught.value.detail


def test_what_is_ignored_has_a_name():
    row = {"messages": [*chat("a"), {"role": "assistant", "content": "b", "weight": 0.5}], "images": [], "answer": 1}
    assert ignored_in(row, BY_NAME["messages"]) == ["images", "messages.weight"]
    assert ignored_in(row | {"messages": json.dumps(row["messages"])}, BY_NAME["messages"])[1:] == ["messages.weight"]
    worse = {"chosen": chat("a", "b"), "rejected": [*chat("a"), {"role": "assistant", "content": "c", "score": 1}]}
    assert ignored_in(worse, BY_NAME["chosen_rejected"]) == ["rejected.score"]
    struct = {"role": ["user", "assistant"], "content": ["a", "b"], "score": [None, 2]}
    for value in (struct, json.dumps(struct)):
        assert ignored_in({"messages": value}, BY_NAME["messages"]) == ["messages.score"]
    asked = json.dumps([{"role": "user", "content": "a", "score": 1}])
    assert ignored_in({"prompt": asked, "completion": "b"}, BY_NAME["prompt_completion"]) == ["prompt.score"]


@pytest.mark.parametrize("answer", [{"name": "Bo", "age": 7, "role": "x"}, [{"name": "Bo", "age": 7, "of": 1}]])
def test_an_answer_that_is_json_is_learnt_whole_and_no_part_of_it_is_called_unread(answer):
    for form, columns in (("alpaca", ("instruction", "output")), ("prompt_chosen_rejected", ("prompt", "chosen"))):
        row = dict.fromkeys(columns, json.dumps(answer))
        assert conversations_of(row, DATA)[0][-1]["content"] == row[columns[1]]
        assert ignored_in(row, BY_NAME[form]) == []


def test_who_speaks_is_counted_where_the_template_does_not_write_it():
    """ChatML has no place for a name; the second template writes a user's, but no assistant's."""
    row = {
        "messages": [{"role": "user", "content": "a", "name": "Bo"}, {"role": "assistant", "content": "b", "name": "C"}]
    }
    source, noted = SourceRow("f:1", row, b"", unread=("id",)), []
    named = "{% for m in messages %}{{ m.name if m.role == 'user' }}: {{ m.content }}<|im_end|>{% endfor %}"
    for template in (TOKENIZER.chat_template, named + "{{ ': ' if add_generation_prompt }}"):
        tokenizer = copy.deepcopy(TOKENIZER)
        tokenizer.chat_template = template
        task = task_of(renderer=ChatRenderer(tokenizer))
        list(prompt_rows.rows_of([source], task, lambda *each: noted.append(each[2])))
    assert noted == [["id", "messages.name"]] * 2
    without = SourceRow("f:2", {"messages": [row["messages"][0], *chat("a", "b")[1:]]}, b"")
    list(prompt_rows.rows_of([without], task, lambda *each: noted.append(each[2])))
    assert noted[2] == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*chat("a"), {"role": "assistant", "content": "b", "train": False}]}, "rejected"),
        ({"messages": [*chat("a"), {"role": "assistant", "content": "b", "weight": 0}]}, "rejected"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "rejected"),
        ({"prompt": "<image> what?", "response": "b", "image": "a.png"}, "media"),
        ({"messages": [*chat("a"), {"role": "assistant", "content": "b", "reasoning_details": [{}]}]}, "malformed"),
    ],
)
def test_a_row_that_means_something_else_without_what_is_not_read_is_refused(row, reason):
    with pytest.raises(Unusable) as caught:
        rows_of(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("label", "unread", "mapped"),
    [(0, True, "rejected"), (1.0, True, []), ("0", True, "rejected"), (2, True, ["label"]), ("cat", True, ["label"]),
     (True, False, []), (" TRUE ", False, [])],
)  # fmt: skip
def test_a_number_is_ktos_label_only_where_the_recipe_says_so(label, unread, mapped):
    """In most data it names a class, one of which would be lost without a word."""
    row, noted = {"prompt": "a", "completion": "b", "label": label}, []
    for data in ({}, {"columns": {"label": "label"}}):
        (found,) = prompt_rows.rows_of([SourceRow("f:1", row, b"")], task_of(**data), lambda *each: noted.append(each))
        if isinstance(found, Unusable):
            noted.append((None, None, found.reason))
    assert [each[2] for each in noted] == [["label"] if unread else [], mapped]


def answer(**keys):
    return {"messages": [*chat("a"), {"role": "assistant", "content": "b"} | keys]}


@pytest.mark.parametrize(
    ("keys", "unread"),
    [
        ({"weight": 1}, []), ({"train": True}, []), ({"training": True}, []), ({"training": 0}, ["training"]),
        ({"weight": 0.5}, ["weight"]), ({"loss": 0.0}, ["loss"]),
        ({"trainable": 0}, ["trainable"]), ({"thinking": True}, ["thinking"]), ({"thought": False}, ["thought"]),
        ({"reasoning_content": False}, ["reasoning_content"]),
    ],
)  # fmt: skip
def test_a_key_of_a_message_is_read_or_counted_and_never_both(keys, unread):
    """A loss is a number of an earlier training, a flag beside a thought says how it was made."""
    row = answer(**keys)
    assert rows_of(row)[0]["real_ids"] == rows_of(answer())[0]["real_ids"]
    assert ignored_in(row, BY_NAME["messages"]) == [f"messages.{key}" for key in unread]


def test_a_flag_beside_a_thought_does_not_differ_from_it():
    (message,) = parse_messages(answer(thinking=False, reasoning="hm")["messages"][1:])
    assert message == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    for read in ({"weight": 0}, {"weight": 0.0}, {"loss": False}):
        assert ignored_in(answer(**read), BY_NAME["messages"]) == []
    with pytest.raises(Unusable, match="its thought must be text, found list"):
        parse_messages(answer(thinking=["hm"])["messages"])


@pytest.mark.parametrize("key", ["train", "training", "loss", "trainable", "weight"])
def test_a_response_that_is_not_to_be_learnt_goes_to_quarantine(key):
    """``training`` is axolotl's ``message_field_training``."""
    with pytest.raises(Unusable, match=rf"message 1 \(assistant\) is not to be learnt \({key}: false\)"):
        rows_of(answer(**{key: False}))


@pytest.mark.parametrize("tag", [False, "false", "False", 0, "0", 0.0])
def test_llama_factorys_tag_of_kto_is_the_label(tag):
    row = {"messages": chat("a", "b"), "kto_tag": tag}
    with pytest.raises(Unusable, match="people did not want"):
        rows_of(row)
    for wanted in (row | {"kto_tag": True}, row | {"kto_tag": 1}, row | {"label": True}):
        assert rows_of(wanted)
        assert ignored_in(mapped(wanted, DATA), BY_NAME["messages"]) == (["kto_tag"] if "label" in wanted else [])


@pytest.mark.parametrize(
    ("given", "name"),
    [("c1", "c1"), (7, "7"), (0, "0"), ("", None), (None, None), (["c"], None), (1.5, None), (2.0, "2"), (True, None)],
)
def test_a_row_names_its_conversation_by_text_or_number(given, name):
    row = {"messages": answer()["messages"], "conversation_id": given}
    assert read_row(row, DataConfig(train="-")).conversation_id == name


def test_messages_that_are_not_to_be_learnt_are_no_responses():
    unlearnt = {"role": "assistant", "content": "b", "weight": 0}
    row = {"messages": [*chat("a"), unlearnt, *chat("c", "d")]}
    assert [each[-1]["content"] for each in conversations_of(row, DataConfig(train="d", turns="all"))] == ["d"]
    assert len(rows_of({"prompt": "<image>", "response": "b", "image": None})) == 1
    assert len(rows_of({"prompt": "<image>", "response": "b"})) == 1


def at(number, **content):
    return SourceRow(f"f.jsonl:{number}", content, b"")


def test_a_file_of_two_forms_is_an_error_that_shows_a_row_of_each():
    rows = [at(1, prompt="a", response="b"), at(2, strange=1), at(3, instruction="c", output="d")]
    assert find_form(rows[:2], DATA) is BY_NAME["prompt_response"]
    with pytest.raises(DataError) as caught:
        find_form(rows, DATA)
    assert str(caught.value) == (
        'f.jsonl:1: is of the form prompt_response ({"prompt": "a", "response": "b"}), but f.jsonl:3 is of the form '
        'alpaca ({"instruction": "c", "output": "d"}); split the file, or name one form by data.form'
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "text": "b"}, "nearest is alpaca, which lacks output (it has instruction, text)"),
        ({"question": "a", "system": "b"}, "nearest is orca, which lacks chosen (it has question, system)"),
        ({"text": "a"}, "data.columns maps names (it has text)"),
    ],
)
def test_a_wrong_form_says_which_form_is_nearest_and_what_it_lacks(row, message):
    with pytest.raises(DataError) as caught:
        find_form([at(1, **row)], DATA)
    assert str(caught.value).startswith("f.jsonl:1: needs messages, or prompt and response")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "cure"),
    [
        (["type", "query", "original_question", "response"], '{prompt: "query"}'),
        (["problem", "solution", "answer", "source"], '{prompt: "problem", response: "solution"}'),
        (["problem", "answer", "solution"], '{prompt: "problem", response: "solution"}'),
        (["query", "answer", "resource", "lang"], '{prompt: "query", response: "answer"}'),
        (["id", "query", "answers", "tools"], '{prompt: "query", response: "answers"}'),
        (["solution", "question", "cot", "attempt"], '{prompt: "question", response: "solution"}'),
        (["system", "user", "assistant"], '{prompt: "user", response: "assistant"}'),
    ],
    ids=["MetaMathQA", "NuminaMath 1.5", "DeepScaleR", "CodeFeedback", "xLAM", "s1K", "system, user, assistant"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_every_kind_of_file_without_a_form_gets_the_same_cure(tmp_path, kind, columns, cure):
    """Of tables only the known columns are read, e.g. ``answer``; the cure names others."""
    path, table = tmp_path / f"a.{kind}", pa.table({name: ["x"] for name in columns})
    if kind == "jsonl":
        path.write_text(json.dumps(dict.fromkeys(columns, "x")) + "\n")
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    rows = [row for piece in split([str(path)]) for row in read_slice(piece)]
    with pytest.raises(DataError) as caught:
        find_form(rows, DATA)
    assert f"try data.columns: {cure} (it has " in str(caught.value)
    assert set(str(caught.value).rpartition("(it has ")[2].rstrip(")").split(", ")) == set(columns)
    (found,) = prompt_rows.rows_of(rows, task_of())
    assert isinstance(found, Unusable) and found.detail.endswith(f"try data.columns: {cure}")


@pytest.mark.parametrize(
    ("columns", "cure"),
    [
        (["instruction", "input", "response"], {"output": "response"}),
        (["instruction", "context", "response", "category"], {"input": "context", "output": "response"}),
        (["question", "context", "response"], {"instruction": "question", "input": "context", "output": "response"}),
        (["query", "input", "answer"], {"instruction": "query", "output": "answer"}),
        (["system", "input", "output"], {"prompt": "input", "response": "output"}),
    ],
    ids=["GPTeacher", "Dolly", "question with context", "query with input", "input alone"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_cure_of_a_file_without_a_form_keeps_the_whole_prompt(tmp_path, kind, columns, cure):
    path, row = tmp_path / f"a.{kind}", {name: f"the {name}" for name in columns}
    pq.write_table(pa.table({name: [text] for name, text in row.items()}), path)
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    pieces = split([str(path)])
    with pytest.raises(DataError) as caught:
        find_form([each for piece in pieces for each in read_slice(piece)], DATA)
    said = ", ".join(f'{ours}: "{theirs}"' for ours, theirs in cure.items())
    assert f"try data.columns: {{{said}}}" in str(caught.value)
    (cured,) = (each for piece in pieces for each in read_slice(piece, cure))
    conversation = conversations_of(cured.content, DataConfig(train="d", columns=cure))[0]
    asked = "\n\n".join(row[name] for name in ("instruction", "question", "query", "input", "context") if name in row)
    assert [said["content"] for said in conversation[-2:]] == [asked, row[next(iter(reversed(cure.values())))]]


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
ORCA = {"system": "s", "input": "a", "chosen": "b", "rejected": "c", "rationale": "r"}
UNASKED = "chosen is text, and there is no prompt that it answers; "


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (HH, UNASKED + "write the prompt into a column prompt, or chosen and rejected as lists of messages"),
        ({"chosen": "b"}, UNASKED + "write the prompt into a column prompt, or chosen"),
        (ORCA, UNASKED + 'try data.columns: {prompt: "input"}'),
        ({"query": "a", "chosen": "b", "rejected": "c"}, UNASKED + 'try data.columns: {prompt: "query"}'),
        ({"prompt": "a", "rejected": "c"}, "has rejected, but no chosen"),
        (dict.fromkeys(("chosen", "rejected"), str(chat("a", "b"))), "chosen: holds messages as Python's text and not"),
        ({"messages": None, "id": 1}, "nearest is messages, but messages is empty"),
        ({"chosen": 5}, "nearest is chosen_rejected, but chosen is of type int and no list of messages"),
    ],
)
def test_a_row_that_has_the_columns_of_a_form_is_not_said_to_lack_them(row, reason):
    with pytest.raises(DataError) as caught:
        find_form([at(1, **row)], DATA)
    (found,) = prompt_rows.rows_of([at(1, **row)], task_of())
    assert isinstance(found, Unusable)
    for said in (str(caught.value), found.detail):
        assert reason in said and "lacks" not in said


def read_from(path: Path, row: dict[str, str], **data: Any) -> Found:
    """Writes a row into JSON lines or Parquet, and reads it back."""
    pq.write_table(pa.table({name: [text] for name, text in row.items()}), path)
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    (content,) = (row for piece in split([str(path)]) for row in read_slice(piece, data.get("columns")))
    return read_row(content.content, DataConfig(train="d", **data), content.unread)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("longer", ["solution", "rationale", "reasoning", "explanation", "thought", "Solution"])
def test_a_short_answer_beside_its_solution_is_no_response_until_the_recipe_says_so(tmp_path, kind, longer):
    row = {"question": "2 + 2?", longer: "2 + 2 = 4", "answer": "4"}
    read = partial(read_from, tmp_path / f"a.{kind}", row)
    cure = {"prompt": "question", "response": longer}
    with pytest.raises(Unusable) as caught:
        read()
    assert f'data.columns: {{prompt: "question", response: "{longer}"}}' in caught.value.detail
    assert (read(columns=cure).ending_with_real, read(columns=cure).row["answer"]) == (
        [chat("2 + 2?", row[longer])],
        "4",
    )
    assert read(form="question_answer").ending_with_real == [chat("2 + 2?", "4")]


@pytest.mark.parametrize(
    "beside",
    [{}, {"solution": "4"}, {"solution": None}, {"solution": ["a long list"]}, {"context": " "}, {"context": {}}],
)
def test_an_answer_without_a_longer_solution_is_a_response(beside):
    assert conversations_of({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"} | beside, DATA)
    assert conversations_of({"prompt": "2 + 2?", "response": "4", "solution": "2 + 2 = 4", "answer": "4"}, DATA)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("about", ["context", "Context", "input"])
def test_a_question_about_a_text_is_not_learnt_without_it_until_the_recipe_says_so(tmp_path, kind, about):
    """sql-create-context: without the tables nobody can answer."""
    row = {"question": "How many?", about: "CREATE TABLE t", "answer": "SELECT COUNT(*)"}
    read = partial(read_from, tmp_path / f"a.{kind}", row)
    cure = f'{{instruction: "question", input: "{about}", output: "answer"}}'
    with pytest.raises(Unusable) as caught:
        read()
    assert f"and {about} would not be read; to read it, set data.columns: {cure}" in caught.value.detail
    assert read(columns=yaml.safe_load(cure)).ending_with_real == [
        chat("How many?\n\nCREATE TABLE t", "SELECT COUNT(*)")
    ]
    assert read(form="question_answer").ending_with_real == [chat("How many?", "SELECT COUNT(*)")]


# Messages


NUMPYS = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': \"it's\"}]"
PYTHONS = [
    str([{"role": "assistant", "content": "b"}]), str([{"content": "it's", "role": "assistant"}]), NUMPYS,
    str([{"from": "gpt", "value": "b"}]), f"array({NUMPYS}, dtype=object)", " [ {'role': 'user'}]",
    str({"role": "assistant", "content": "b"}),
]  # fmt: skip


@pytest.mark.parametrize("text", PYTHONS)
@pytest.mark.parametrize(
    "columns", [("prompt", "chosen"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
                ("instruction", "output"), ("instruction", "chosen"), ("question", "chosen")]
)  # fmt: skip
def test_messages_as_python_prints_them_are_no_text_of_a_message(columns, text):
    rows = [dict.fromkeys(columns, "x") | {column: text} for column in columns]
    for row in (*rows, {"prompt": "x", "chosen": "y", "rejected": text}):
        with pytest.raises(Unusable) as caught:
            conversations_of(row, DATA)
        column = next(name for name, value in row.items() if value == text)
        assert caught.value.detail.startswith(f"{column}: holds messages as Python's text and not as JSON")
        assert "write the data as JSON lines" in caught.value.detail


@pytest.mark.parametrize("text", ["[{'name': 'Bo', 'role': 'cook'}]", "Use [{'role': 'user'}].", "{'content': 'b'}"])
def test_python_that_is_no_list_of_messages_is_text(text):
    assert conversations_of({"prompt": "x", "response": text}, DATA) == [chat("x", text)]


def test_a_column_system_may_differ_from_the_message_by_blanks():
    said = [{"role": "system", "content": "Be brief.\n"}, *chat("a", "b")]
    expected = read_row({"messages": said}, DATA).ending_with_real
    assert read_row({"messages": said, "system": " Be brief."}, DATA).ending_with_real == expected


def test_tool_calls_thoughts_and_tools_are_kept_under_one_name():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    values = [
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm"},
        {"from": "function_call", "value": json.dumps(call["function"])},
        {"from": "observation", "value": "20", "tool_call_id": "c1"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]},
    ]
    assert parse_messages(values) == [
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "20", "tool_call_id": "c1"},
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
    ]
    for tools, expected in ((json.dumps([call]), [call]), ([call], [call]), ("[]", None)):
        assert read_row({"messages": chat("a", "b"), "tools": tools}, DATA).tools == expected


@pytest.mark.parametrize("written", [json.dumps, list])
def test_calls_made_at_once_are_one_message(written):
    """LLaMA-Factory writes parallel calls as a list in one function_call."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": it} for it in calls]}
    assert parse_messages([{"from": "function_call", "value": written(calls)}]) == [said]
    assert parse_messages([{"role": "assistant", "content": "", "function_call": written(calls)}]) == [said]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "must be JSON with name and arguments"),
        ({"conversations": [{"from": "function_call", "value": '[{"name": "f"}, 1]'}]}, "or a list of it"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part 'image_url'"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "must be JSON with name and arguments"),
        ({"messages": chat("a", "b"), "tools": 7}, "tools: expected a list, found int"),
        ({"conversations": [{"from": "system", "value": "a"}], "system": "b"}, "another system message"),
        ({"instruction": "a", "input": 3, "output": "b"}, "instruction and input must be text"),
        ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "do not answer the same prompt"),
    ],
)
def test_a_row_that_its_form_cannot_read_says_why(row, detail):
    with pytest.raises(Unusable) as caught:
        rows_of(row)
    assert detail in caught.value.detail


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": chat("a", "b"), "tools": [{"type": "function"}]}, "it has tools, which"),
        ({"messages": [*chat("a"), {"role": "assistant", "content": "b", "reasoning": "c"}]}, "has reasoning_content"),
    ],
)
def test_what_the_chat_template_does_not_write_is_refused_by_its_name(row, name):
    with pytest.raises(Unusable) as caught:
        rows_of(row, task_of())
    assert caught.value.reason == "template" and name in caught.value.detail


def test_a_tool_message_is_rendered_where_the_template_writes_every_role():
    row = {"messages": [*chat("a", "b"), {"role": "tool", "content": "20 degrees"}, *chat("d", "e")]}
    (made,) = rows_of(row, task_of())
    assert "tool\n20 degrees" in TOKENIZER.decode(made["prompt_ids"])
