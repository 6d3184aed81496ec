"""Thoughts in texts, whose marks are tokens that the template writes, too: ids of transformers, or a refusal."""

from typing import Any

import pytest

from spin_ray.inputs.check import FirstConversation, check_token_ids
from spin_ray.inputs.findings import find_in_rows
from spin_ray.inputs.rendering import ChatRenderer, RenderError
from tests.support.tokenizer_kinds import tokenizer_of_kind

S, E = "<|im_start|>", "<|im_end|>"
ASKED = {"role": "user", "content": "What is it?"}
THOUGHT = {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nParis."}
TURN = f"{S}{{{{ m.role }}}}\n{{{{ m.content }}}}{E}\n"
SPLIT = (
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in m.content else '' %}"
    "{% set said = m.content.split('</think>')[-1] | trim %}"
)


def ask(opened: str) -> str:
    return f"{{% if add_generation_prompt %}}{S}assistant\n{opened}{{% endif %}}"


def turns(answer: str, opened: str) -> str:
    other = "{% for m in messages %}{% if m.role != 'assistant' %}" + TURN + "{% else %}"
    return f"{other}{SPLIT}{S}assistant\n{answer}{E}\n{{% endif %}}{{% endfor %}}{ask(opened)}"


EMPTY = "{{ '<think>\n\n</think>\n\n' }}"
PLACED = "{{ '<think>\n' + thought + '\n</think>\n\n' + said }}"
REFUSED = {
    "Qwen 3 without thinking": turns(PLACED, EMPTY),
    "GLM 4.5 without thinking": turns("{{ '<think>' + thought + '</think>\n' + said }}", "<think></think>"),
    "EXAONE 4, which drops thoughts": turns("{{ '<think>\n\n</think>\n\n' + said }}", EMPTY),
    "SmolLM 3 without thinking": turns(
        "{{ m.content if thought else '<think>\n\n</think>\n\n' + said }}", EMPTY
    ),
}  # fmt: skip
WRITTEN = {
    "Qwen 3": turns(PLACED, ""),
    "Qwen 3.5": turns(PLACED, "{{ '<think>\n' }}"),
    "Phi 4": f"{S}system\nWrite <think> thought </think> answer.{E}\n{{% for m in messages %}}{TURN}{{% endfor %}}"
    + ask(""),
    "Qwen 3.8, which leaves thoughts in texts alone": turns(
        "{{ '<think>\n\n</think>\n\n' + m.content }}", "{{ '<think>\n' }}"
    ),
}  # fmt: skip


def renderer_of(template: str) -> ChatRenderer:
    tokenizer = tokenizer_of_kind("byte level", template)
    tokenizer.add_tokens(["<think>", "</think>"])
    return ChatRenderer(tokenizer)


@pytest.mark.parametrize("name", REFUSED)
def test_a_thought_that_the_prompt_has_ended_before_is_refused(name):
    (refused,) = renderer_of(REFUSED[name]).render_all([[ASKED, THOUGHT]])
    assert isinstance(refused, RenderError)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("before", [[ASKED], [ASKED, THOUGHT, ASKED], [ASKED | {"content": "Use <think>."}]])
def test_a_thought_in_a_text_has_the_ids_of_transformers(name, before):
    renderer, messages = renderer_of(WRITTEN[name]), [*before, THOUGHT]
    rendered = renderer.render(messages)
    whole = renderer.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    ours = rendered.prompt_ids + rendered.real_ids
    assert ours == whole[: len(ours)] and renderer.tokenizer.decode(whole[len(ours) :]) == "\n"
    assert renderer.tokenizer.convert_tokens_to_ids("</think>") in rendered.real_ids
    assert check_token_ids(renderer, [FirstConversation("d.jsonl:1", messages, None)]) == 1


@pytest.mark.parametrize("text", ["Well. <think>a</think>b", "<think>a</think>b<think>c</think>d"])
def test_a_text_of_which_the_template_would_drop_a_part_is_refused(text):
    said: dict[str, Any] = {"role": "assistant", "content": text}
    with pytest.raises(RenderError, match="leaves out part of the response, around </think>"):
        renderer_of(WRITTEN["Qwen 3"]).render([ASKED, said])


NEMOTRON = turns(
    "{% set thought = m.reasoning_content or thought %}"
    "{% if thought %}{{ '<think>\n' + thought + '\n</think>\n' + said }}"
    "{% else %}<think></think>{{ said }}{% endif %}",
    "{{ '<think>' + ('\n' if enable_thinking | default(true) else '</think>') }}",
)


@pytest.mark.parametrize("said", [
    THOUGHT, {"role": "assistant", "content": "Paris.", "reasoning_content": "first"},
], ids=["marks", "a key"])  # fmt: skip
def test_a_prompt_that_opens_a_thought_takes_answers_with_one(said):
    """Nemotron 3: an answer without a thought goes on otherwise than its prompt."""
    renderer = renderer_of(NEMOTRON)
    rendered = renderer.render([ASKED, said])
    whole = renderer.tokenizer.apply_chat_template([ASKED, said], return_dict=True)["input_ids"]
    ours = rendered.prompt_ids + rendered.real_ids
    assert ours == whole[: len(ours)] and renderer.end_of_turn == E
    assert renderer.tokenizer.decode(rendered.prompt_ids).rstrip("\n").endswith("assistant\n<think>")
    assert renderer.tokenizer.decode(rendered.real_ids).lstrip("\n") == f"first\n</think>\nParis.{E}"
    assert rendered.prompt_ids == renderer.render_prompt([ASKED])


def test_an_answer_without_the_thought_that_its_prompt_opens_is_refused():
    renderer, plain = renderer_of(NEMOTRON), [ASKED, {"role": "assistant", "content": "Paris."}]
    with pytest.raises(RenderError, match=r"opens a thought by '<think>\\n', and the response has none"):
        renderer.render(plain)
    assert renderer.render([ASKED, THOUGHT, *plain[:1], THOUGHT])
    (finding,) = find_in_rows(renderer, [(plain, None)], "d.jsonl")
    assert finding.severity == "error"
    assert finding.sentence.endswith("; set model.chat_template_kwargs: {enable_thinking: false}")
