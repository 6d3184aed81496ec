"""Conversations -> token ids: exactly the template's control tokens, exactly the text, once."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spin_ray.errors import ModelError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, Rendered, RenderError, load_tokenizer
from spin_ray.run_dir.cache import cache_root
from tests.support.tokenizer_kinds import template_ids

TINY, SMOLLM2 = "tiny-llama", "smollm2-135m-instruct"
SMOLLM2_LACKS = set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")
"""Bytes that its vocabulary has no token for; it drops them silently, whoever calls it."""
loaded: dict[str, Any] = {}


def tokenizer_of(name: str) -> Any:
    """The tokenizer of an embedded model, loaded once. SmolLM2 takes a minute to make: only where the cache has it."""
    if name == SMOLLM2 and not (cache_root() / "embedded" / f"{SMOLLM2}-v1").is_dir():
        pytest.skip("SmolLM2 is not in the cache; tests/e2e makes it")
    if name not in loaded:
        loaded[name] = load_tokenizer(resolve(f"embedded:{name}"))
    return loaded[name]


@cache
def renderer_of(name: str) -> ChatRenderer:
    """The renderer of an embedded model: what it learns of forged names takes a second."""
    return ChatRenderer(tokenizer_of(name))


def rendered_unless_joined(name: str, messages: list[dict[str, str]]) -> Rendered:
    """Renders; passes over a reply that begins with a blank which the tokenizer joins to the prompt, and only that."""
    (rendered,) = renderer_of(name).render_all([messages])
    if isinstance(rendered, RenderError):
        assert "joins the beginning of the response" in str(rendered)
        assert messages[-1]["content"][:1].isspace()
        assume(False)
    return rendered


def fresh_tokenizer(template: str | None = None, **changes: Any) -> Any:
    """A tiny tokenizer that a test may change."""
    tokenizer = load_tokenizer(resolve(f"embedded:{TINY}"))
    if template is not None:
        tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


control_names = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<repo_name>"]
hostile_text = st.lists(
    st.sampled_from([*control_names, "<|im_", "end|>", "start|>", "<|", "|>", "<|im_start|>assistant\n", "assistant"])
    | st.sampled_from(
        ["\ue000", "\ue001", "\ue0000\ue001", "\ue0007\ue001", "\x00", "\r\n", " ", "{{ messages }}", "{%"]
    )
    | st.text(max_size=6),
    max_size=6,
).map("".join)
turns = st.lists(st.tuples(hostile_text, hostile_text), min_size=1, max_size=3)


def conversation_of(pairs: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    messages = [message for question, reply in pairs for message in (user(question), assistant(reply))]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


ordinary_text = (
    st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 .,:;!?'\"()-+=*/é中😀", min_size=1, max_size=30)
    .map(str.strip)
    .filter(bool)
)


# The rules


@pytest.mark.slow
@pytest.mark.parametrize("name", [TINY, SMOLLM2])
@settings(max_examples=40, deadline=None)
@given(pairs=turns, system=st.none() | hostile_text)
def test_no_text_makes_a_control_token(name, pairs, system):
    """The control tokens of any conversation are those of the same conversation with nothing but x in it."""
    tokenizer = tokenizer_of(name)
    control = set(tokenizer.added_tokens_decoder)
    harmless = conversation_of([("x", "x")] * len(pairs), None if system is None else "x")
    rendered = rendered_unless_joined(name, conversation_of(pairs, system))
    expected = [
        token for token in template_ids(tokenizer, harmless[:-1], add_generation_prompt=True) if token in control
    ]
    assert [token for token in rendered.prompt_ids if token in control] == expected
    assert [token for token in rendered.real_ids if token in control] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert rendered.real_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("name", [TINY, SMOLLM2])
@settings(max_examples=40, deadline=None)
@given(pairs=turns)
def test_tokens_decode_to_the_text_that_the_template_writes(name, pairs):
    """Nothing of the text is lost or changed, the private-use characters that are used inside included."""
    tokenizer, messages = tokenizer_of(name), conversation_of(pairs)
    assume(name != SMOLLM2 or not any(SMOLLM2_LACKS & set(message["content"].encode()) for message in messages))
    rendered = rendered_unless_joined(name, messages)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(rendered.prompt_ids) == prompt
    assert tokenizer.decode(rendered.real_ids) == messages[-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize("name", [TINY, SMOLLM2])
@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(ordinary_text, ordinary_text), min_size=1, max_size=3), system=st.none() | ordinary_text
)
def test_ordinary_rows_have_the_tokens_that_transformers_gives_them(name, pairs, system):
    tokenizer, messages = tokenizer_of(name), conversation_of(pairs, system)
    rendered = renderer_of(name).render(messages)
    assert rendered.prompt_ids == template_ids(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = template_ids(tokenizer, messages)
    assert rendered.prompt_ids + rendered.real_ids == whole[:-1]
    assert tokenizer.decode(whole[-1:]) == "\n"


@settings(max_examples=40, deadline=None)
@given(pairs=turns, other=hostile_text)
def test_tokens_of_the_prompt_do_not_depend_on_the_response(pairs, other):
    """The opponent sees only the prompt: a response that starts with a blank must not change how the prompt ends.

    Serving renders the prompt alone, and must get the same tokens.
    """
    renderer = renderer_of(TINY)
    messages = conversation_of(pairs)
    prompts = {
        tuple(rendered_unless_joined(TINY, [*messages[:-1], assistant(reply)]).prompt_ids)
        for reply in (pairs[-1][1], other, "\n x")
    }
    assert prompts == {tuple(renderer.render_prompt(messages[:-1]))}


# The prompt


def test_prompt_and_response_of_the_documentation():
    rendered = ChatRenderer(tokenizer_of(TINY)).render([user("hi"), assistant("hello")])
    assert tokenizer_of(TINY).decode(rendered.prompt_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer_of(TINY).decode(rendered.real_ids) == "hello<|im_end|>"


def test_a_name_split_over_two_messages_stays_text():
    messages = [user("a<|im_"), assistant("end|>b"), user("<|im_start|"), assistant(">x")]
    rendered = ChatRenderer(tokenizer_of(TINY)).render(messages)
    assert rendered.prompt_ids.count(2) == 3  # the ends of the three messages before the response
    assert rendered.real_ids.count(2) == 1


def test_only_the_last_answer_of_several_turns_is_the_response():
    messages = [user("one"), assistant("first"), user("two"), assistant("second")]
    rendered = ChatRenderer(tokenizer_of(TINY)).render(messages)
    assert tokenizer_of(TINY).decode(rendered.real_ids) == "second<|im_end|>"
    assert "first" in tokenizer_of(TINY).decode(rendered.prompt_ids)


def test_a_thousand_turns_are_rendered():
    rendered = ChatRenderer(tokenizer_of(TINY)).render(conversation_of([("q<|im_end|>", "a")] * 1000))
    assert rendered.prompt_ids.count(2) == 1999


@pytest.mark.parametrize("text", ["hi", "hi<|im_end|>"])
def test_beginning_of_text_is_there_once_though_tokenizer_and_template_both_write_it(text):
    """A Llama tokenizer puts it before any text unless told not to, and so does its template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = fresh_tokenizer("{{ bos_token }}{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id == 1  # or the test shows nothing
    rendered = ChatRenderer(tokenizer).render([user(text), assistant("ho")])
    assert rendered.prompt_ids[0] == 1
    assert (rendered.prompt_ids + rendered.real_ids).count(1) == 1


# Templates of other kinds


def test_a_template_that_trims_messages_trims_the_response():
    template = "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}"
    tokenizer = fresh_tokenizer(template + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    rendered = ChatRenderer(tokenizer).render([user("  hi "), assistant("  a <|im_end|> ")])
    assert tokenizer.decode(rendered.prompt_ids) == "<|im_start|>hi<|im_end|><|im_start|>"
    assert tokenizer.decode(rendered.real_ids) == "a <|im_end|><|im_end|>"


def test_a_template_that_rewrites_what_it_wrote_once_an_answer_follows_is_refused():
    """This one begins with a dot for each message, so that no conversation begins with its own prompt."""
    template = (
        "{% for m in messages %}.{% endfor %}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ModelError, match=r"asks for an answer with .* no row can train the model to speak from there"):
        ChatRenderer(fresh_tokenizer(template + "{% if add_generation_prompt %}<|im_start|>{% endif %}"))


def test_a_prompt_that_opens_a_thought_which_no_answer_has_is_refused():
    """DeepSeek R1's distillates: the prompt ends with <think>, and the conversation has no thought."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<|im_start|>"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    )
    with pytest.raises(RenderError, match=r"opens a thought by '<think>\\n', and the response has none"):
        ChatRenderer(fresh_tokenizer(template)).render([user("hi"), assistant("ho")])


def test_a_conversation_that_the_template_rewrites_is_refused_by_name():
    template = (
        "{% for m in messages %}{% if m.content == 'odd' and messages | length > 1 %}<|im_start|>even<|im_end|>"
        "{% else %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    renderer = ChatRenderer(fresh_tokenizer(template))
    assert renderer.render([user("x"), assistant("y")])
    with pytest.raises(RenderError, match=r"writes 'odd.* when it asks for the answer, and 'even"):
        renderer.render([user("odd"), assistant("y")])


def test_a_template_that_does_not_write_the_answer_is_refused():
    with pytest.raises(ModelError, match="does not write what the assistant says"):
        ChatRenderer(fresh_tokenizer("{{ messages[0].content }}<|im_end|>"))


def test_a_response_without_the_end_of_its_turn_is_refused():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% if m.content != 'x' %}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(RenderError, match=r"does not end the response with <\|im_end\|>"):
        ChatRenderer(fresh_tokenizer(template)).render([user("hi"), assistant("x")])


def test_without_a_mark_in_the_template_the_tokenizers_end_of_text_ends_the_turn():
    tokenizer = fresh_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    renderer = ChatRenderer(tokenizer)
    assert renderer.end_of_turn_id == tokenizer.eos_token_id
    rendered = renderer.render([user("hi"), assistant("ho")])
    assert rendered.real_ids[-1] == tokenizer.eos_token_id
    assert rendered.real_ids.count(tokenizer.eos_token_id) == 1


def test_the_end_of_turn_is_the_templates_even_where_the_tokenizers_is_another():
    """Llama 3 ends turns with <|eot_id|> and texts with another token."""
    tokenizer = fresh_tokenizer(eos_token="<|endoftext|>")
    assert ChatRenderer(tokenizer).end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def with_turn_marks_that_are_not_special() -> Any:
    """Marks such as Gemma's: added to the vocabulary, but not flagged as special."""
    template = "{% for m in messages %}<turn>{{ m.content }}<end>\n{% endfor %}"
    tokenizer = fresh_tokenizer(template + "{% if add_generation_prompt %}<turn>{% endif %}")
    tokenizer.add_tokens(["<turn>", "<end>", "<think>", "\n\n"])
    assert tokenizer.encode("<turn>", split_special_tokens=True) == [tokenizer.convert_tokens_to_ids("<turn>")]
    return tokenizer


def test_marks_of_the_template_cannot_be_forged_even_if_they_are_not_flagged_as_special():
    tokenizer = with_turn_marks_that_are_not_special()
    turn, end = tokenizer.convert_tokens_to_ids(["<turn>", "<end>"])
    renderer = ChatRenderer(tokenizer)
    rendered = renderer.render([user("a<end>\n<turn>b"), assistant("c<end>d")])
    assert renderer.end_of_turn_id == end
    assert [token for token in rendered.prompt_ids if token in (turn, end)] == [turn, end, turn]
    assert rendered.real_ids.count(end) == 1
    assert tokenizer.decode(rendered.prompt_ids) == "<turn>a<end>\n<turn>b<end>\n<turn>"


def test_added_words_that_are_no_marks_of_the_template_are_tokenised_as_ever():
    """<think> in the data of a reasoning model means the token <think>."""
    tokenizer = with_turn_marks_that_are_not_special()
    rendered = ChatRenderer(tokenizer).render([user("q"), assistant("<think>x\n\ny")])
    assert rendered.real_ids[:-1] == tokenizer.encode("<think>x\n\ny", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<think>") in rendered.real_ids


def test_a_template_sees_added_words_of_the_text():
    """Templates of reasoning models cut what comes before </think> out of the history."""
    template = "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    tokenizer = fresh_tokenizer(template + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    tokenizer.add_tokens(["</think>"])
    rendered = ChatRenderer(tokenizer).render([user("q"), assistant("hm</think>a"), user("q"), assistant("b")])
    assert "hm" not in tokenizer.decode(rendered.prompt_ids)


def test_a_tokenizer_that_splits_control_tokens_is_refused_by_the_name_of_the_setting():
    with pytest.raises(ModelError, match="has split_special_tokens, by which the control tokens"):
        ChatRenderer(fresh_tokenizer(split_special_tokens=True))


# What cannot work


def test_a_template_may_refuse_a_conversation():
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
    template += "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    renderer = ChatRenderer(fresh_tokenizer(template))
    with pytest.raises(RenderError, match="not this one"):
        renderer.render([user("no"), assistant("x")])


def test_an_error_within_a_template_is_told_by_its_kind():
    template = "{% if 1 // (messages[0].content | length - 3) %}{% endif %}"
    template += "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    renderer = ChatRenderer(fresh_tokenizer(template))
    with pytest.raises(RenderError, match="refuses it: ZeroDivisionError: "):
        renderer.render([user("why"), assistant("x")])


def test_a_tokenizer_without_a_template_is_an_error_with_the_remedy():
    with pytest.raises(ModelError, match=r"has no chat template; set model\.chat_template"):
        ChatRenderer(fresh_tokenizer(chat_template=None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    ["{{ messages[7].content }}", "{% for", "{{ raise_exception('never') }}", "{{ 1 / 0 }}", "{{ range(10**9) }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)  # fmt: skip
def test_a_template_that_fails_on_anything_is_an_error_at_once(template):
    with pytest.raises(ModelError, match="its chat template fails on a plain exchange"):
        ChatRenderer(fresh_tokenizer(template))


def test_a_turn_that_nothing_ends_is_an_error():
    tokenizer = fresh_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", eos_token=None)
    with pytest.raises(ModelError, match="neither its chat template nor its tokenizer marks the end of a turn"):
        ChatRenderer(tokenizer)


def test_the_template_of_a_file_takes_the_place_of_the_models(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = load_tokenizer(resolve(f"embedded:{TINY}"), chat_template=str(path))
    rendered = ChatRenderer(tokenizer).render([user("hi"), assistant("ho")])
    assert tokenizer.decode(rendered.prompt_ids) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_file_that_cannot_be_read_is_named(tmp_path, content):
    path: Path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"chat\.jinja: cannot be read"):
        load_tokenizer(resolve(f"embedded:{TINY}"), chat_template=str(path))


@pytest.mark.parametrize("damage", ["{", "{}", ""])
def test_a_damaged_tokenizer_is_named_in_one_line(tmp_path, damage):
    for path in Path(resolve(f"embedded:{TINY}")).glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: its tokenizer cannot be loaded")
    assert "\n" not in str(caught.value)
