"""A client hears the response alone where the prompt's ids end before the prompt's text does."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream

from spin_ray.inputs.rendering import ChatRenderer, RenderError
from spin_ray.serving.engines import CHAT, TOKENS, Item
from spin_ray.serving.held_back import without_held_back
from spin_ray.serving.iterate_engine import IterateEngine
from tests.support.arena_app import event
from tests.support.pieces import pieces_through
from tests.support.tiny_runs import tiny_config
from tests.support.tokenizer_kinds import KINDS, TEMPLATES, tokenizer_of_kind

ASKED = [{"role": "user", "content": "What is it?"}]
REPLIES = ["Yes, the answer is Paris.", "ants said No", "(a) two", "t"]
HELD_BACK = [" ", "ssistant"]


def renderer_of(template: str, kind: str = "byte level") -> ChatRenderer:
    return ChatRenderer(tokenizer_of_kind(kind, TEMPLATES[template]))


def answered(reply: str) -> list[dict[str, str]]:
    return [*ASKED, {"role": "assistant", "content": reply}]


def spoken(tokenizer: Any, prompt_ids: list[int], response_ids: list[int]) -> str:
    """Returns the text of a response as vLLM makes it: token by token, after the prompt's."""
    stream = DecodeStream(ids=prompt_ids, skip_special_tokens=True)
    return "".join(stream.step(tokenizer.backend_tokenizer, token) or "" for token in response_ids)


def heard(pieces: list[Item], held_back: str) -> list[Any]:
    """Returns the pieces that go out, events as objects."""
    out = pieces_through(lambda said: without_held_back(said, held_back), pieces)
    return [piece if isinstance(piece, dict) else objects(piece) for piece in out]


def objects(events: str) -> list[Any]:
    data = [each.removeprefix("data: ") for each in events.split("\n\n") if each]
    return [json.loads(each) for each in data if each != "[DONE]"]


def text_of(pieces: list[Any], index: int = 0) -> str:
    choices = [choice for events in pieces for told in events for choice in told["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == index)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("unigram", "wordpiece")])
@pytest.mark.parametrize("template", ["newline", "blank", "word", "zephyr", "llama 3"])
def test_a_response_is_spoken_as_the_held_back_text_and_what_was_said(kind: str, template: str) -> None:
    """For tokenizers that lose nothing; the other two change letters and blanks."""
    tokenizer = tokenizer_of_kind(kind, TEMPLATES[template])
    renderer = ChatRenderer(tokenizer)
    held_back = renderer.held_back_text(ASKED)
    assert tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True).endswith(held_back.strip())
    for reply in REPLIES:
        rendered = renderer.render_all([answered(reply)])[0]
        if not isinstance(rendered, RenderError):  # "t" may be joined to the template's last word
            assert rendered.real_ids[-1] == renderer.end_of_turn_id
            assert spoken(tokenizer, rendered.prompt_ids, rendered.real_ids[:-1]) == held_back + reply


@pytest.mark.parametrize(
    ("template", "held_back"),
    [("blank", " "), ("word", "ssistant"), ("newline", ""), ("llama 3", ""), ("zephyr", "")],
)
def test_ordinary_templates_hold_nothing_back(template: str, held_back: str) -> None:
    assert renderer_of(template).held_back_text(ASKED) == held_back


def test_what_cannot_be_rendered_is_refused() -> None:
    tokenizer = tokenizer_of_kind("byte level", "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}"
                                  "{% endif %}" + TEMPLATES["blank"])  # fmt: skip
    with pytest.raises(RenderError, match="the chat template refuses it: no"):
        ChatRenderer(tokenizer).held_back_text([{"role": "user", "content": "no"}])


@pytest.mark.parametrize("held_back", HELD_BACK)
def test_streams_cut_at_every_position_lose_the_held_back_text_and_nothing_else(held_back: str) -> None:
    """Two cuts, anywhere; one piece may have several events, and the last text may come with the reason of the end."""
    for reply in ("Yes, it is.", " (a)", "t", ""):
        said = held_back + reply
        for first in range(len(said) + 1):
            for second in range(first, len(said) + 1):
                texts = said[:first], said[first:second], said[second:]
                apart: list[Item] = [*(event({"content": text}) for text in texts), event({}, "stop")]
                together = "".join([event({"content": text}) for text in texts[:2]])
                at_end: list[Item] = [together, event({"content": texts[2]}, "stop") + "data: [DONE]\n\n"]
                assert text_of(heard(apart, held_back)) == reply
                assert text_of(heard(at_end, held_back)) == reply


@pytest.mark.parametrize("held_back", HELD_BACK)
def test_a_text_that_begins_otherwise_stays_as_it_is(held_back: str) -> None:
    for said in ("Yes", "", "s", "ss", "sssistant", "\n"):
        pieces: list[Item] = [*(event({"content": letter}) for letter in said), event({}, "stop")]
        assert text_of(heard(pieces, held_back)) == said
        assert heard([whole(said)], held_back) == [whole(said)]


def test_only_the_first_held_back_text_is_taken() -> None:
    assert text_of(heard([event({"content": "  "}), event({"content": " x"}), event({}, "stop")], " ")) == "  x"


def test_each_choice_has_a_beginning_of_its_own() -> None:
    """Choices 0 and 1 alternate letter by letter."""
    texts = {0: "ssistantYes", 1: "ssNo"}
    pieces: list[Item] = []
    for letter in range(11):
        for index, text in texts.items():
            choice = {"index": index, "delta": {"content": text[letter : letter + 1]}, "finish_reason": None}
            pieces.append(f"data: {json.dumps({'choices': [choice]})}\n\n")
    told = heard(pieces, "ssistant")
    assert (text_of(told, 0), text_of(told, 1)) == ("Yes", "ssNo")


def test_whole_answers_errors_and_usage_pass() -> None:
    error, usage = {"error": {"code": 500}}, 'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n'
    assert heard([whole(" Yes", " No", "x"), error, usage], " ") == [whole("Yes", "No", "x"), error, objects(usage)]


def whole(*texts: str) -> dict[str, Any]:
    choices = [{"index": i, "message": {"content": text}, "finish_reason": "stop"} for i, text in enumerate(texts)]
    return {"choices": choices}


def test_closing_reaches_the_engine() -> None:
    async def check() -> bool:
        closed = False

        async def said() -> AsyncGenerator[Item, None]:
            nonlocal closed
            try:
                while True:
                    yield event({"content": "x"})
            finally:
                closed = True

        pieces = without_held_back(said(), " ")
        await anext(pieces)
        await pieces.aclose()
        return closed

    assert asyncio.run(check())


class Speaking(IterateEngine):
    """An engine whose model says ``text``; all else is the real one."""

    def __init__(self, renderer: ChatRenderer, text: str) -> None:
        self._renderer, self._config, self._text = renderer, tiny_config(), text
        self._stops, self._client, self._vocabulary = [renderer.end_of_turn_id], SimpleNamespace(errored=False), 2**20
        self._iterate = SimpleNamespace(name="sft")

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        async def events() -> AsyncGenerator[str, None]:
            for letter in self._text:
                yield event({"content": letter})
            yield event({}, "stop")

        return events()


@pytest.mark.parametrize(("template", "held_back"), [("blank", " "), ("word", "ssistant"), ("newline", "")])
def test_sampled_and_given_answers_have_the_same_text_and_ids(template: str, held_back: str) -> None:
    """An engine that says what ``real_ids`` spell is heard to say the answer; given, the answer has these ids."""
    tokenizer = tokenizer_of_kind("byte level", TEMPLATES[template])
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.render(answered("Yes, it is."))
    engine = Speaking(renderer, spoken(tokenizer, rendered.prompt_ids, rendered.real_ids[:-1]))
    assert engine._text == held_back + "Yes, it is."

    async def answers(operation: str, **fields: Any) -> list[Any]:
        return [item async for item in engine.answer(operation, {"messages": ASKED, **fields})]

    said = asyncio.run(answers(CHAT, model="sft", stream=True))
    assert text_of([objects(piece) for piece in said]) == "Yes, it is."
    for reason, response in (("stop", rendered.real_ids), ("length", rendered.real_ids[:-1])):
        (given,) = asyncio.run(answers(TOKENS, content="Yes, it is.", finish_reason=reason))
        assert given["prompt_token_ids"] == rendered.prompt_ids == renderer.render_prompt(ASKED)
        assert given["choices"][0]["token_ids"] == response
