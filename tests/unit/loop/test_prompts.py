"""SFT rows -> prompts, below Ray: each row is used or in quarantine with a reason, and none gets lost."""

import json
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from spin_ray.errors import DataError
from spin_ray.inputs import sources
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.inputs.sources import split
from spin_ray.loop.stages import prompts
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage, table_from_bytes
from tests.support.fakes import config_of
from tests.unit.inputs.test_prompt_rows import chat, rows_of, task_of

REASONS = {"malformed", "empty", "too_long", "template", "duplicate"}
Row = dict[str, Any]


class Made:
    """Prompts, quarantine and counts of a data file, made as the stage makes them but for Ray."""

    def __init__(
        self,
        root: Path,
        lines: list[str | Row],
        max_rows: int | None = None,
        part_rows: int = 4,
        leaked: Any = None,
        **task: Any,
    ):
        data = root / "data.jsonl"
        root.mkdir(exist_ok=True)
        data.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        self.run = RunDir(Storage(root / "run"))
        render = prompts._RenderSlice(self.run.storage, "prompts", task_of(**task))
        slices = []
        for number, piece in enumerate(split([str(data)])):
            item = {"uri": piece.uri, "start": piece.start, "stop": piece.stop, "name": f".attempts/{number:06d}"}
            slices.append(prompts._rendered(render(item)))
        self.slices, artefact = slices, self.run.prompts
        firsts = prompts._first_of_each([each.ids for each in slices], max_rows, leaked)
        self.entries, self.reasons = prompts._finish(self.run.storage, slices, artefact, firsts, part_rows)

    @property
    def rows(self) -> list[Row]:
        tables = [self.run.prompts.read_part(name, entry) for name, entry in sorted(self.entries.items())]
        return [row for table in tables for row in table.to_pylist()]

    @property
    def quarantine(self) -> list[Row]:
        return table_from_bytes(self.run.storage.read("quarantine/prompts.parquet")).to_pylist()


# Whole files


def test_duplicates_go_to_quarantine_and_the_first_stays(tmp_path):
    rows = [{"messages": chat("a", "b")}, {"prompt": "a", "response": "b"}, {"messages": chat("a", "c")}]
    made = Made(tmp_path, rows)
    assert [json.loads(row["messages"])[1]["content"] for row in made.rows] == ["b", "c"]
    assert made.reasons == {"duplicate": 1}
    assert made.quarantine[0]["origin"] == f"{tmp_path}/data.jsonl:2"


def test_a_process_opens_the_tokenizer_once_for_all_slices(tmp_path):
    sent = ray.cloudpickle.dumps(prompts._RenderSlice(Storage(tmp_path), "prompts", task_of()))
    one, other = ray.cloudpickle.loads(sent), ray.cloudpickle.loads(sent)
    assert one._task.renderer is other._task.renderer


def test_duplicates_are_found_over_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 50)
    made = Made(tmp_path, [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}] * 3)
    assert len(made.rows) == 2
    assert made.reasons == {"duplicate": 4}


def test_rows_keep_their_order_and_are_cut_into_parts(tmp_path, monkeypatch):
    """Ten rows from many slices, in parts of four: 4, 4, 2."""
    monkeypatch.setattr(sources, "SLICE_BYTES", 70)
    made = Made(tmp_path, [{"prompt": f"q{i}", "response": "r"} for i in range(10)])
    assert [json.loads(row["messages"])[0]["content"] for row in made.rows] == [f"q{i}" for i in range(10)]
    assert [entry.rows for _, entry in sorted(made.entries.items())] == [4, 4, 2]


def test_max_rows_takes_the_first_usable_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 70)
    rows = ["{", *({"prompt": f"q{i}", "response": "r"} for i in (0, 0, 1, 2, 3, 4))]
    made = Made(tmp_path, rows, max_rows=3)
    assert [json.loads(row["messages"])[0]["content"] for row in made.rows] == ["q0", "q1", "q2"]
    assert made.reasons == {"malformed": 1, "duplicate": 1}


def test_rows_that_are_held_out_are_not_trained_on_and_do_not_count_as_bad(tmp_path, caplog):
    """q1 is held out: of five rows, two are leaks, one repeats q0, and two stay."""
    rows = [{"prompt": f"q{i}", "response": "r"} for i in (0, 1, 1, 0, 2)]
    held_out = Made(tmp_path / "h", rows[1:2]).slices[0].ids
    made = Made(tmp_path, rows, max_rows=2, leaked=held_out)
    assert [json.loads(row["messages"])[0]["content"] for row in made.rows] == ["q0", "q2"]
    assert made.reasons == {"leak": 2, "duplicate": 1}
    check(made, 0.34)
    assert "2 rows are held out, too" in caplog.text
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used \(1 duplicate\).*data\.jsonl:4: duplicate"):
        check(made, 0.33)
    with pytest.raises(DataError, match="all rows are held out, too"):
        check(Made(tmp_path, rows[1:2], leaked=held_out), 1.0)


def test_leaks_that_are_kept_are_counted(tmp_path, caplog):
    made = Made(tmp_path, [{"prompt": f"q{i}", "response": "r"} for i in (0, 1, 2)])
    held_out = made.slices[0].ids[1:]
    assert prompts._count_kept_leaks(made.slices, held_out, "d.jsonl") == 2
    assert "d.jsonl: 2 rows are held out, too, and are trained on (data.keep_leaks)" in caplog.text


def test_forms_and_unread_columns_are_found_over_all_slices_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 50)
    rows = [{"prompt": f"q{i}", "response": "r", "id": i, "system": None} for i in range(3)]
    made = Made(tmp_path, [*rows, {"messages": chat("a", "")}, {"messages": chat("a", "b"), "tag": "x"}])
    assert sum((each.ignored for each in made.slices), Counter()) == {"id": 3, "tag": 1}
    prompts._refuse_mixed_files(made.slices, [f"file{i}" for i in range(len(made.slices))])
    with pytest.raises(DataError, match=r"jsonl:1: is of the form prompt_response .*is of the form messages \("):
        prompts._refuse_mixed_files(made.slices, ["one"] * len(made.slices))


def test_quarantine_holds_the_row_as_it_came(tmp_path):
    lines = [
        '{"prompt": "a",  "response" :"b" , "id":0x1}',
        '{"messages": [], "kept": [1.50]}',
        '{"prompt": "\\ud800", "response": "b"}',
    ]
    made = Made(tmp_path, lines)
    assert [row["row"].decode() for row in made.quarantine] == lines
    assert [row["reason"] for row in made.quarantine] == ["malformed", "empty", "malformed"]
    assert {row["stage"] for row in made.quarantine} == {"prompts"}


def test_parts_of_an_attempt_that_was_never_committed_are_replaced(tmp_path):
    Made(tmp_path, [{"prompt": f"old{i}", "response": "r"} for i in range(9)])
    made = Made(tmp_path, [{"prompt": "new", "response": "r"}])
    assert made.run.prompts.part_names() == ["part-00000.parquet"]
    assert json.loads(made.rows[0]["messages"])[0]["content"] == "new"


# The error budget


def check(made: Made, fraction: float) -> None:
    config = config_of(data={"train": "d.jsonl", "max_quarantine_fraction": fraction})
    prompts._check_quarantine(made.run, config, made.run.prompts, "d.jsonl", made.slices, made.reasons)


def test_too_many_bad_rows_are_an_error_that_says_which_and_why(tmp_path):
    good = [{"prompt": f"q{i}", "response": "r"} for i in range(6)]
    made = Made(tmp_path, [*good, "{", {"messages": []}, "[]", {"prompt": "q0", "response": "r"}])
    with pytest.raises(DataError) as caught:
        check(made, 0.39)
    assert str(caught.value) == (
        "d.jsonl: 4 of 10 rows cannot be used (2 malformed, 1 empty, 1 duplicate), more than "
        f"data.max_quarantine_fraction 0.39; first: {tmp_path}/data.jsonl:7: malformed: not a JSON object "
        "(Expecting property name enclosed in double quotes at character 2); "
        f"all are in {made.run.storage.root}/quarantine/prompts.parquet"
    )


def test_as_many_bad_rows_as_allowed_are_counted_in_the_log(tmp_path, caplog):
    """4 of 10, and 0.4 are allowed."""
    made = Made(tmp_path, [*({"prompt": f"q{i}", "response": "r"} for i in range(6)), "{", "{", "{", "{"])
    check(made, 0.4)
    assert "4 of 10 rows in quarantine (4 malformed)" in caplog.text


def test_rows_that_are_not_taken_count_as_rows_that_were_read(tmp_path, caplog):
    """One of 20 is bad, and two are taken."""
    made = Made(tmp_path, [*({"prompt": f"q{i}", "response": "r"} for i in range(19)), "{"], max_rows=2)
    check(made, 0.05)
    assert "1 of 20 rows in quarantine (1 malformed)" in caplog.text


def test_conversations_are_counted_as_conversations_and_not_by_their_turns(tmp_path):
    """Of five, one is malformed; each of the others makes three rows, of which one is the same in all: 3 of 12 rows
    repeat, which is one conversation's worth.
    """
    turns = [
        {"messages": [*chat("hi", "hello"), *chat(f"q{i}", "r"), *chat(f"p{i}", "r")]} for i in range(4)
    ]  # fmt: skip
    made = Made(tmp_path, [*turns, "{"], turns="all")
    assert made.reasons == {"malformed": 1, "duplicate": 3} and len(made.rows) == 9
    with pytest.raises(DataError, match=r"2 of 5 rows cannot be used \(3 duplicate, 1 malformed\)"):
        check(made, 0.39)
    check(made, 0.4)


def test_no_usable_row_is_an_error_whatever_is_allowed(tmp_path):
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        check(Made(tmp_path, ["{"]), 1.0)


def test_no_row_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"d\.jsonl: holds no rows"):
        check(Made(tmp_path, ["", "  "]), 1.0)


# Anything at all

any_text = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["", " ", "\x00", "\ud800", "<|im_end|>", "\ue0000\ue001", "x" * 2000, "é" * 50]
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool"]) | any_json
messages = st.lists(st.fixed_dictionaries({}, optional={"role": roles, "content": any_text | any_json}), max_size=5)
good_chat = st.lists(any_text, min_size=2, max_size=6).map(lambda texts: chat(*texts))
any_row = (
    st.fixed_dictionaries({}, optional={"messages": messages | good_chat | any_json, "answer": any_json})
    | st.fixed_dictionaries({"messages": good_chat}, optional={"answer": any_json})
    | st.fixed_dictionaries({"prompt": any_text | any_json, "response": any_text | any_json})
    | any_json
)


@settings(max_examples=35, deadline=None)
@given(st.lists(any_row, min_size=1, max_size=5), st.sampled_from(["last", "first", "all"]), st.none() | any_text)
@example([{"messages": chat("a", "b"), "answer": 10**400}], "last", None)
@example([{"messages": chat(*["q", "r"] * 2000)}], "last", None)
@example([{"messages": [[[[]]]]}, {"messages": chat("a" * 10**5, "b")}, {"messages": chat("a", "\x00")}], "all", "")
def test_any_row_is_used_or_in_quarantine_and_none_is_lost(tmp_path_factory, rows, turns, system):
    assume(len(rows) > 1 or not isinstance(rows[0], list))  # a file of one array is an array, and its places are bytes
    try:
        (system or "").encode()
    except UnicodeEncodeError:
        system = None  # YAML cannot hold a lone surrogate
    root = tmp_path_factory.mktemp("any")
    made = Made(root, [json.dumps(row) for row in rows], turns=turns, system=system)
    where = Counter(row["origin"] for row in made.quarantine if row["reason"] != "duplicate")
    assert {row["reason"] for row in made.quarantine} <= REASONS
    assert max(where.values(), default=1) == 1
    unique_good = {row["prompt_id"] for row in made.rows}
    assert len(unique_good) == len(made.rows)
    expected = set()
    for number, row in enumerate(rows, start=1):
        content = json.loads(json.dumps(row)) if isinstance(row, dict) else None
        try:
            expected |= {made_row["prompt_id"] for made_row in rows_of(content, task_of(turns=turns, system=system))}
            in_quarantine = 0
        except Unusable:
            in_quarantine = 1
        assert where[f"{root}/data.jsonl:{number}"] == in_quarantine
    assert unique_good == expected
    for row in made.rows:
        assert len(row["prompt_ids"]) + len(row["real_ids"]) <= 128
        assert row["real_ids"].count(2) == 1


def test_the_date_that_a_template_writes_makes_no_other_template(monkeypatch):
    """Llama 3.2's template writes the day. A run goes on after midnight."""
    tokenizer = load_tokenizer(resolve("embedded:tiny-llama"))
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    renderer = ChatRenderer(tokenizer)
    question = [{"role": "user", "content": "?"}]
    first, prompt = prompts.template_digest(renderer), renderer.render_prompt(question)
    tomorrow = datetime.now() + timedelta(days=1)
    later = ChatRenderer(tokenizer, date=tomorrow)
    assert later.render_prompt(question) != prompt, "or the test shows nothing"
    assert prompts.template_digest(later) == first
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: tomorrow))
    assert renderer.render_prompt(question) == prompt, "a run has one date"
    tokenizer.chat_template = "Today: " + tokenizer.chat_template
    assert prompts.template_digest(ChatRenderer(tokenizer)) != first
