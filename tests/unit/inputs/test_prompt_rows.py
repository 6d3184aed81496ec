"""Source rows -> prompt rows: each is used, or says why it cannot be."""

import json
import pickle
import shutil
from dataclasses import replace
from typing import Any

import pytest

from spin_ray.config.sections import DataConfig
from spin_ray.inputs import prompt_rows
from spin_ray.inputs.answers import answer_of
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.prompt_rows import PromptTask
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.inputs.sources import SourceRow

TINY = resolve("embedded:tiny-llama")
TOKENIZER = load_tokenizer(TINY)
RENDERER = ChatRenderer(TOKENIZER)
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
    (found,) = prompt_rows.rows_of([source], task or task_of())
    if isinstance(found, Unusable):
        raise found
    return found


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids)


def test_prompt_and_response_of_a_row_have_their_tokens_and_its_messages():
    (row,) = rows_of({"messages": chat("hi", "hello"), "answer": "7"})
    assert text_of(row["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(row["real_ids"]) == "hello<|im_end|>"
    assert json.loads(row["messages"]) == chat("hi", "hello")
    assert row["answer_text"] == "7"


@pytest.mark.parametrize(
    ("turns", "texts", "unread"),
    [
        ("last", ("a", "b", "c"), ["messages after the last response"]),
        ("all", ("a", "b", "c", "d", "e"), ["messages after the last response"]),
        ("last", ("a", "b", "c", "d"), []),
        ("first", ("a", "b", "c"), []),
    ],
)
def test_a_last_message_that_nobody_answers_is_counted(turns, texts, unread):
    """Only with ``turns: first`` was it asked to be left out."""
    content = {"messages": chat(*texts)}
    told = []
    list(
        prompt_rows.rows_of(
            [SourceRow("here:1", content, json.dumps(content).encode())],
            task_of(turns=turns),
            lambda source, found, names: told.extend(names),
        )
    )
    assert told == unread


def test_rejected_answers_the_last_prompt_alone():
    """The first turn of both conversations is the same, so it has no worse response."""
    pair = {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "c", "x")}
    first, last = rows_of(pair, task_of(turns="all"))
    assert (first["rejected_ids"], text_of(last["rejected_ids"])) == (None, "x<|im_end|>")
    task = replace(task_of(turns="all"), needs_rejected=True)
    task.__dict__["renderer"] = RENDERER
    assert rows_of(pair, task) == [last]
    with pytest.raises(Unusable, match="no_rejected"):
        rows_of({"chosen": chat("a", "b")}, task)


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
        ({}, None), (float("nan"), None), ("inf", None), (float("inf"), None), (1.5e300, 1.5e300), (0.1, 0.1),
        (["#### 12"], None), ({"####": 12}, None),
        ("1,234", 1234.0), ("so #### 12", 12.0), (True, None), ("1,2", None),
        pytest.param(10**400, None, id="past any float"),
        pytest.param("9" * 400, None, id="past any float, as text"),
    ],
)  # fmt: skip
def test_an_answers_text_is_a_finite_number_or_none_as_the_answer_is(value, answer):
    (row,) = rows_of({"messages": chat("a", "b"), "answer": value})
    assert answer_of(row["answer_text"]) == answer_of(value) == answer


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (None, "malformed", "not a JSON object"),
        ({}, "malformed", "needs messages, or prompt and response"),
        ({"prompt": "a"}, "malformed", "nearest is prompt_response, which lacks response"),
        ({"prompt": "a", "response": None}, "malformed", "response: must be text, found NoneType"),
        ({"messages": "hi"}, "malformed", "messages: expected a list, found str"),
        ({"messages": ["hi"]}, "malformed", "message 0: is text without a speaker"),
        ({"messages": [7]}, "malformed", "message 0: needs a role of system, developer, user, assistant"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "malformed", "message 0: needs a role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "malformed", "message 0: needs a role"),
        ({"messages": [{"role": "user"}]}, "malformed", "message 0: content must be text, found NoneType"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "malformed", "content must be text, found list"),
        ({"messages": chat("a\ud800", "b")}, "malformed", "message 0: content is not valid Unicode"),
        ({"messages": []}, "empty", "no assistant message"),
        ({"messages": chat("a")}, "empty", "no assistant message"),
        (
            {"messages": [{"role": "system", "content": "a"}, chat("a", "b")[1]]},
            "empty",
            "follows no message of a user",
        ),
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


OWN_VARIABLES = (
    "{% set start = '<no>' if thinking is false else '' %}{% if custom %}{{ custom }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ start }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ start }}{% endif %}"
)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"thinking": False}, '"thinking": false'),
        ('{"thinking": false, "custom": ""}', '"thinking": false'),
        ({"thinking": True, "custom": "Be brief."}, '"custom": "Be brief."'),
        ({"custom": "long" * 40}, "custom,"),
        ({"thinking": True, "custom": ""}, None),
        ({"thinking": None, "other": "x", "messages": [], "tools": [{"name": "f"}]}, None),
        ("no JSON", None),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_row_whose_own_variables_would_write_it_otherwise_is_unusable(given, named, labelled):
    """TRL renders such a row with them, so that its ids would be others."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = OWN_VARIABLES
    task = replace(task_of(renderer=(renderer := ChatRenderer(tokenizer))), labelled=labelled)
    task.__dict__["renderer"] = renderer
    content = {"messages": chat("a", "b"), "chat_template_kwargs": given}
    if named is None:
        assert rows_of(content, task) == rows_of({"messages": chat("a", "b")}, task)
        return
    with pytest.raises(Unusable, match=f"its chat_template_kwargs has {named}") as caught:
        rows_of(content, task)
    assert caught.value.reason == "template"
    if "thinking" in named:
        task.__dict__["renderer"] = ChatRenderer(tokenizer, {"thinking": False})
        assert rows_of(content, task), "the recipe says the same"


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
        {"prompt": "2 + 2?", "messages": chat("2 + 2?", "22"), "chosen": "4", "rejected": "5"},
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
        ({"prompt": "a", "response": "b", "chosen": None, "rejected": "c"}, "has rejected, but no chosen"),
        ({"messages": chat("a", "b"), "chosen": "b", "rejected": "c"}, "there is no prompt that it answers"),
        ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "do not answer the same prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected: must be text, found int"),
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


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory):
    """A model of 384 embeddings whose tokenizer has the id 384, too."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(TINY, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save_pretrained(folder)
    return PromptTask(str(folder), None, False, 128, DataConfig(train="d")).prepared()


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_row_with_a_token_that_the_model_does_not_embed_is_unusable(larger_tokenizer, column, labelled):
    """Behind the first rows, which are checked at the start, such rows are few."""
    task = pickle.loads(pickle.dumps(larger_tokenizer))  # as Ray sends it  # noqa: S301
    assert {"renderer", "without_embedding"} <= vars(task).keys(), "no process loads the tokenizer again"
    task = replace(task, labelled=labelled)
    content = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert rows_of(content, task)
    content |= {column: "x <tool_call>"}
    if not labelled and column != "prompt":
        assert rows_of(content, task), "responses of questions are not read"
        return
    with pytest.raises(Unusable) as caught:
        rows_of(content, task)
    assert caught.value.reason == "vocabulary"
    assert caught.value.detail == "the model has no embedding for <tool_call> (id 384)"


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


def test_a_question_leaves_room_for_one_token_of_an_answer_at_least():
    (row,) = rows_of({"prompt": "a"}, replace(task_of(), labelled=False))
    length = len(row["prompt_ids"])
    assert rows_of({"prompt": "a"}, replace(task_of(max_length=length + 1), labelled=False))
    with pytest.raises(Unusable) as caught:
        rows_of({"prompt": "a"}, replace(task_of(max_length=length), labelled=False))
    assert caught.value.reason == "too_long"


# Two parts of one file (data.heldout_fraction)


def part(rows: list[Row], which: Any, **data: Any) -> list[list[Row] | Unusable]:
    sources = [SourceRow(str(number), row, b"") for number, row in enumerate(rows)]
    return list(prompt_rows.rows_of(sources, replace(task_of(heldout_fraction=0.2, **data), part=which)))


def test_each_conversation_is_of_one_part_whatever_else_is_set_or_in_the_file():
    """400 rows of 0.2: 80 are held out, give or take four standard deviations of 8."""
    chats = [{"messages": chat(f"Is {number} odd?", "a", "b", "c")} for number in range(400)]
    held_out = [bool(rows) for rows in part(chats, "held out")]
    assert [not rows for rows in part(chats, "trained")] == held_out
    assert abs(sum(held_out) - 80) < 32
    assert [bool(rows) for rows in part(chats[::-1], "held out")] == held_out[::-1]
    for data in ({"turns": "all"}, {"turns": "first"}, {"system": "Be brief."}):
        assert [bool(rows) for rows in part(chats, "held out", **data)] == held_out
    assert all(len(rows) == 2 for rows in part(chats, "trained", turns="all") if rows), "whole conversations"
    others = [{"prompt": f"Is {number} odd?", "response": "another"} for number in range(400)]
    assert [bool(rows) for rows in part(others, "held out")] == held_out, "one question, one part"
    whole = replace(task_of(), part=None)
    assert all(prompt_rows.rows_of([SourceRow("1", chats[0], b"")], whole))


def test_a_row_that_cannot_be_used_is_told_of_once():
    """Rows that cannot be read are told of among those to train on, others in their own part."""
    bad = [None, {"text": "x"}, *({"messages": chat(f"Is {number} odd? " * 99, "a")} for number in range(40))]
    trained, held_out = part(bad, "trained"), part(bad, "held out")
    assert [isinstance(it, Unusable) for it in trained[:2]] == [True, True] and held_out[:2] == [[], []]
    assert all(
        isinstance(one, Unusable) != isinstance(other, Unusable) for one, other in zip(trained, held_out, strict=True)
    )
    assert any(isinstance(it, Unusable) for it in held_out)
