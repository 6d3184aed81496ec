"""SFT rows -> prompts, below Ray: each row is used or in quarantine with a reason, and none gets lost."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spin_ray.config.sections import DataConfig
from spin_ray.errors import DataError
from spin_ray.inputs import sources
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.inputs.sources import SourceRow, split
from spin_ray.loop.stages import prompts
from spin_ray.loop.stages.prompts import PromptTask
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage, table_from_bytes
from tests.support.fakes import config_of

TINY = resolve("embedded:tiny-llama")
TOKENIZER = load_tokenizer(TINY)
RENDERER = ChatRenderer(TOKENIZER)
REASONS = {"malformed", "empty", "too_long", "template", "duplicate"}
Row = dict[str, Any]


def task_of(max_length: int = 128, renderer: ChatRenderer = RENDERER, **data: Any) -> PromptTask:
    task = PromptTask(TINY, None, False, max_length, DataConfig(train="d", **data))
    task.__dict__["renderer"] = renderer  # spares loading the tokenizer again
    return task


def chat(*texts: str) -> list[Row]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rows_of(content: Any, task: PromptTask | None = None) -> list[Row]:
    source = SourceRow("here:1", content, json.dumps(content).encode())
    (found,) = prompts.rows_of([source], task or task_of())
    if isinstance(found, Unusable):
        raise found
    return found


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids)


class Made:
    """Prompts, quarantine and counts of a data file, made as the stage makes them but for Ray."""

    def __init__(
        self, root: Path, lines: list[str | Row], max_rows: int | None = None, part_rows: int = 4, **task: Any
    ):
        data = root / "data.jsonl"
        data.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        self.run = RunDir(Storage(root / "run"))
        render = prompts._RenderSlice(self.run.storage, "prompts", task_of(**task))
        slices = []
        for number, piece in enumerate(split([str(data)])):
            item = {"uri": piece.uri, "start": piece.start, "stop": piece.stop, "name": f".attempts/{number:06d}"}
            slices.append(prompts._rendered(render(item)))
        self.entries, self.reasons = prompts._finish(self.run.storage, slices, self.run.prompts, max_rows, part_rows)

    @property
    def rows(self) -> list[Row]:
        tables = [self.run.prompts.read_part(name, entry) for name, entry in sorted(self.entries.items())]
        return [row for table in tables for row in table.to_pylist()]

    @property
    def quarantine(self) -> list[Row]:
        return table_from_bytes(self.run.storage.read("quarantine/prompts.parquet")).to_pylist()


# One row


def test_prompt_and_response_of_a_row_have_their_tokens_and_its_messages():
    (row,) = rows_of({"messages": chat("hi", "hello"), "answer": "7"})
    assert text_of(row["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(row["real_ids"]) == "hello<|im_end|>"
    assert json.loads(row["messages"]) == chat("hi", "hello")
    assert row["answer"] == 7.0


def test_prompt_and_response_columns_are_the_same_row_as_their_messages():
    assert rows_of({"prompt": "hi", "response": "hello"}) == rows_of({"messages": chat("hi", "hello")})
    assert rows_of({"messages": None, "prompt": "hi", "response": "hello"}) == rows_of(
        {"messages": chat("hi", "hello")}
    )


def test_a_row_is_named_by_its_tokens():
    ids = [rows_of({"messages": chat("a", text)})[0]["prompt_id"] for text in ("b", "b", "c")]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(("turns", "responses"), [("last", ["d"]), ("first", ["b"]), ("all", ["b", "d"])])
def test_turns_choose_which_answers_are_responses(turns, responses):
    rows = rows_of({"messages": chat("a", "b", "c", "d", "e")}, task_of(turns=turns))
    assert [text_of(row["real_ids"]) for row in rows] == [f"{text}<|im_end|>" for text in responses]
    for row in rows:  # nothing after the response is in the row, and what a user says is never in the response
        assert text_of(row["prompt_ids"]).count("<|im_end|>") == len(json.loads(row["messages"])) - 1


def test_the_system_message_of_the_config_is_for_conversations_that_have_none():
    own = [{"role": "system", "content": "own"}, *chat("a", "b")]
    task = task_of(system="config")
    assert text_of(rows_of({"messages": chat("a", "b")}, task)[0]["prompt_ids"]).startswith(
        "<|im_start|>system\nconfig<"
    )
    assert text_of(rows_of({"messages": own}, task)[0]["prompt_ids"]).startswith("<|im_start|>system\nown<")
    assert "system" not in text_of(rows_of({"messages": chat("a", "b")})[0]["prompt_ids"])


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (7, 7.0), ("7.5", 7.5), (" -3 ", -3.0), ("1e3", 1000.0), (None, None), ("seven", None), ("", None), ([7], None),
        ({}, None), (float("nan"), None), ("inf", None),
        pytest.param(10**400, None, id="past any float"),
        pytest.param("9" * 400, None, id="past any float, as text"),
    ],
)  # fmt: skip
def test_an_answer_is_a_finite_number_or_none(value, answer):
    (row,) = rows_of({"messages": chat("a", "b"), "answer": value})
    assert row["answer"] == answer


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (None, "malformed", "not a JSON object"),
        ({}, "malformed", "needs messages, or prompt and response"),
        ({"prompt": "a"}, "malformed", "needs messages, or prompt and response"),
        ({"prompt": "a", "response": None}, "malformed", "message 1: content must be text, found NoneType"),
        ({"messages": "hi"}, "malformed", "messages: expected a list, found str"),
        ({"messages": ["hi"]}, "malformed", "message 0: needs a role of system, user or assistant"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "malformed", "message 0: needs a role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "malformed", "message 0: needs a role"),
        ({"messages": [{"role": "user"}]}, "malformed", "message 0: content must be text, found NoneType"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "malformed", "content must be text, found list"),
        ({"messages": chat("a\ud800", "b")}, "malformed", "message 0: content is not valid Unicode"),
        ({"messages": []}, "empty", "no assistant message"),
        ({"messages": chat("a")}, "empty", "no assistant message"),
        ({"messages": chat("a", "b")[1:]}, "empty", "starts with the assistant: there is no prompt"),
        ({"messages": chat("a", " \n")}, "empty", "message 1 (assistant) has no text"),
        ({"messages": chat("a", "b" * 200)}, "too_long", "tokens, model.max_length is 128"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(content, reason, detail):
    with pytest.raises(Unusable) as caught:
        rows_of(content)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_a_conversation_that_the_template_refuses_is_unusable():
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}"
    tokenizer.chat_template += "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(Unusable) as caught:
        rows_of({"messages": chat("no", "b")}, task_of(renderer=ChatRenderer(tokenizer)))
    assert (caught.value.reason, caught.value.detail) == ("template", "the chat template refuses it: not so")


def test_the_longest_row_that_fits_is_used():
    """Prompt and response of max_length tokens together, and one more."""
    (row,) = rows_of({"messages": chat("a", "b" * 20)})
    length = len(row["prompt_ids"]) + len(row["real_ids"])
    assert rows_of({"messages": chat("a", "b" * 20)}, task_of(max_length=length)) == [row]
    with pytest.raises(Unusable):
        rows_of({"messages": chat("a", "b" * 20)}, task_of(max_length=length - 1))


def test_one_bad_turn_makes_the_whole_conversation_unusable():
    """Half a conversation would be neither used nor in quarantine."""
    with pytest.raises(Unusable):
        rows_of({"messages": chat("a", "b", "c", " ")}, task_of(turns="all"))


# Whole files


def test_duplicates_go_to_quarantine_and_the_first_stays(tmp_path):
    rows = [{"messages": chat("a", "b")}, {"prompt": "a", "response": "b"}, {"messages": chat("a", "c")}]
    made = Made(tmp_path, rows)
    assert [json.loads(row["messages"])[1]["content"] for row in made.rows] == ["b", "c"]
    assert made.reasons == {"duplicate": 1}
    assert made.quarantine[0]["origin"] == f"{tmp_path}/data.jsonl:2"


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
    prompts._check_quarantine(made.run, config, made.run.prompts, "d.jsonl", len(made.rows), made.reasons)


def test_too_many_bad_rows_are_an_error_that_says_which_and_why(tmp_path):
    good = [{"prompt": f"q{i}", "response": "r"} for i in range(6)]
    made = Made(tmp_path, [*good, "{", {"messages": []}, "[]", {"prompt": "q0", "response": "r"}])
    with pytest.raises(DataError) as caught:
        check(made, 0.39)
    assert str(caught.value) == (
        "d.jsonl: 4 of 10 rows cannot be used (2 malformed, 1 empty, 1 duplicate), more than "
        f"data.max_quarantine_fraction 0.39; first: {tmp_path}/data.jsonl:7: malformed: not a JSON object; "
        f"all are in {made.run.storage.root}/quarantine/prompts.parquet"
    )


def test_as_many_bad_rows_as_allowed_are_counted_in_the_log(tmp_path, caplog):
    """4 of 10, and 0.4 are allowed."""
    made = Made(tmp_path, [*({"prompt": f"q{i}", "response": "r"} for i in range(6)), "{", "{", "{", "{"])
    check(made, 0.4)
    assert "4 of 10 rows in quarantine (4 malformed)" in caplog.text


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


# Preferences and questions


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"chosen": chat("2 + 2?", "4"), "rejected": chat("2 + 2?", "5")},
        {
            "prompt": "2 + 2?",
            "messages": chat("2 + 2?", "4"),
            "chosen": chat("2 + 2?", "4"),
            "rejected": chat("2 + 2?", "5"),
        },
    ],
)
def test_a_preference_row_has_both_responses_after_one_prompt(content):
    (row,) = rows_of(content)
    (plain,) = rows_of({"prompt": "2 + 2?", "response": "4"})
    assert (row["prompt_ids"], row["real_ids"]) == (plain["prompt_ids"], plain["real_ids"])
    assert text_of(row["rejected_ids"]) == "5<|im_end|>"
    assert plain["rejected_ids"] is None
    assert row["prompt_id"] != plain["prompt_id"], "one chosen may be preferred to many"


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ({"prompt": "a", "response": "b", "rejected": "c"}, "has rejected, but no chosen"),
        ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "do not answer the same prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "content must be text, found int"),
    ],
)
def test_a_preference_row_that_cannot_be_used_says_why(content, detail):
    with pytest.raises(Unusable) as caught:
        rows_of(content)
    assert detail in caught.value.detail


def test_a_rejected_response_that_is_too_long_spoils_the_row():
    with pytest.raises(Unusable) as caught:
        rows_of({"prompt": "a", "chosen": "b", "rejected": "c " * 200})
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "why?"},
        {"prompt": "why?", "response": "so"},
        {"messages": chat("why?")},
        {"messages": chat("why?", "so")},
    ],
)
def test_a_question_is_a_prompt_whose_response_is_not_read(content):
    (row,) = rows_of(content, replace(task_of(), labelled=False, data=DataConfig(train="d")))
    assert row["real_ids"] == []
    assert row["prompt_ids"] == rows_of({"prompt": "why?", "response": "because"})[0]["prompt_ids"]


def test_a_row_without_a_question_says_so():
    with pytest.raises(Unusable) as caught:
        rows_of({"response": "so"}, replace(task_of(), labelled=False))
    assert caught.value.detail == "needs messages, or prompt"
