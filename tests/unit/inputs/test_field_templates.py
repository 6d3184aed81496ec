"""Twelve chat templates of the field, each as an own minimal one with its traits: ids of transformers, or a refusal."""

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from spin_ray.inputs.check import _other_ids
from spin_ray.inputs.findings import find_in_rows, find_in_template
from spin_ray.inputs.rendering import ChatRenderer, Rendered
from tests.support.tokenizer_kinds import tokenizer_of_kind, transformers_date

S, E = "<|im_start|>", "<|im_end|>"
SYSTEM = {"role": "system", "content": "Be good."}
ASKED = {"role": "user", "content": " What is it? "}
SAID = {"role": "assistant", "content": " Paris. \n"}
THOUGHT = {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nParis."}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
    "name": "look", "arguments": {"at": "x"}}}]}  # fmt: skip
SEEN = {"role": "tool", "content": "20"}
ROWS = {
    "plain": [ASKED, SAID],
    "two turns": [ASKED, SAID, ASKED, SAID],
    "system": [SYSTEM, ASKED, SAID],
    "two questions": [ASKED, ASKED, SAID],
    "thought": [ASKED, THOUGHT],
    "earlier thought": [ASKED, THOUGHT, ASKED, SAID],
    "tools": [ASKED, CALL, SEEN, SAID],
}
TURN = f"{{{{ '{S}' + m.role + '\\n' + m.content + '{E}\\n' }}}}"
ASK = f"{{% if add_generation_prompt %}}{{{{ '{S}assistant\\n' }}}}{{% endif %}}"
TURNS = "{% for m in messages %}" + TURN + "{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
CUT = "m.content.split('</think>')[-1]"


class Field(NamedTuple):
    template: str
    end: str = E
    refused: Mapping[str, str] = MappingProxyType({})
    """Refusals by the row, in words of their own."""
    finding: str = ""
    kind: str = "byte level"


FIELD = {
    "chatml": Field(TURNS + ASK, refused={"tools": "it has tools"}),
    "default system (Qwen 2.5)": Field(
        f"{{% if messages[0].role != 'system' %}}{S}system\nBe kind.{E}\n{{% endif %}}" + TURNS + ASK,
        refused={"tools": "it has tools"}, finding="adds a system message of 8 characters",
    ),
    "system refused, alternation, trims, own end (Gemma)": Field(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALTERNATE
        + TURNS.replace("m.content", "(m.content | trim)") + ASK,
        refused={"system": "no system", "two questions": "alternate", "tools": "it has tools"},
        finding="refuses system",
    ),
    "bos twice, trims, blank in the prompt (Llama 2)": Field(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
        "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}",
        "</s>", {"tools": "it has tools"}, kind="metaspace first",
    ),
    "date and several ends (Llama 3.2)": Field(
        f"{{{{ bos_token }}}}{S}system\n{{{{ strftime_now('%d %b %Y') }}}}{E}"
        + TURNS.replace("m.content", "(m.content | trim)") + ASK,
        refused={"tools": "it has tools"}, finding="may write the date; this run's is 26 Jul 2024",
    ),
    "eos behind the answer alone (Zephyr)": Field(
        "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}", "</s>",
        refused={"tools": "it has tools"}, kind="metaspace first",
    ),
    "system folded away, alternation (Mistral)": Field(
        "{{ bos_token }}{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}", "</s>",
        {"system": "message 0 (system): its chat", "two questions": "alternate", "tools": "it has tools"},
        "leaves system messages out",
    ),
    "thoughts of earlier turns cut, a switch (Qwen 3)": Field(
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}" + TURN.replace("m.content", CUT)
        + "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK.replace("\\n' }}", "\\n' }}{% if enable_thinking is "
        "defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"),
        refused={"tools": "it has tools"}, finding="takes thoughts out of earlier turns",
    ),
    "thoughts cut everywhere": Field(
        TURNS.replace("m.content", CUT) + ASK,
        refused={"thought": "takes the thought that ends with </think> out", "tools": "it has tools"},
    ),
    "prompt opens a thought (R1)": Field(
        TURNS.replace("m.content", CUT) + ASK.replace("assistant\\n'", "assistant\\n<think>\\n'"),
        refused={"tools": "it has tools"} | dict.fromkeys(
            ["plain", "two turns", "system", "two questions", "earlier thought"],
            "and the response has none that ends",
        ),
    ),
    "tools (Hermes)": Field(
        f"{{% if tools %}}{{{{ '{S}system\\n' + tools | tojson + '{E}\\n' }}}}{{% endif %}}"
        "{% for m in messages %}" + TURN.replace(
            "m.content", "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '')"
        ) + "{% endfor %}" + ASK,
    ),
    "no mark at the end (Alpaca)": Field(
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}", "</s>", {"tools": "it has tools"},
    ),
}  # fmt: skip


def renderer_of(name: str, **kwargs: Any) -> ChatRenderer:
    field = FIELD[name]
    return ChatRenderer(tokenizer_of_kind(field.kind, field.template), kwargs, datetime(2024, 7, 26))


@pytest.mark.parametrize("name", FIELD)
def test_a_template_of_the_field_gives_the_ids_of_transformers_or_a_refusal_by_name(name):
    field, renderer = FIELD[name], renderer_of(name)
    assert renderer.end_of_turn == field.end
    found = [finding.sentence for finding in find_in_template(renderer.template)]
    assert any(field.finding in each for each in found) or not field.finding, found
    for row, messages in ROWS.items():
        tools = [TOOL] if row == "tools" else None
        (rendered,) = renderer.render_all([messages], [tools])
        if isinstance(rendered, Rendered):
            assert row not in field.refused, row
            assert rendered.prompt_ids + rendered.real_ids == whole_ids(renderer, field, messages, tools), row
            assert _other_ids(renderer, messages, tools, rendered) is None, row
        else:
            assert field.refused.get(row, "never refused") in str(rendered), (row, str(rendered))


def whole_ids(renderer: ChatRenderer, field: Field, messages: Any, tools: Any) -> list[int]:
    """Returns transformers' own ids up to the end of the turn; for R1 by a template that keeps the last thought."""
    tokenizer = tokenizer_of_kind(field.kind, field.template)
    if renderer.template.opening:
        keeps = TURNS.replace("m.content", f"(m.content if loop.last else {CUT})")
        tokenizer.chat_template = field.template.replace(TURNS.replace("m.content", CUT), keeps)
    with transformers_date(datetime(2024, 7, 26)):
        ids = list(tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"])
    end = renderer.end_of_turn_id
    return ids[: len(ids) - ids[::-1].index(end)] if renderer.writes_end_of_turn else [*ids, end]


@pytest.mark.parametrize("said", [
    THOUGHT, {"role": "assistant", "content": "Paris.", "reasoning_content": "first"},
    {"role": "assistant", "content": "first\n</think>\n\nParis."},
], ids=["marks", "a key", "as the model writes it"])  # fmt: skip
def test_an_opened_thought_is_never_opened_twice(said):
    renderer = renderer_of("prompt opens a thought (R1)")
    rendered = renderer.render([ASKED, said])
    text = renderer.tokenizer.decode(rendered.prompt_ids + rendered.real_ids)
    assert text.endswith(f"assistant\n<think>\nfirst\n</think>\n\nParis.{E}") and text.count("<think>") == 1
    assert renderer.tokenizer.decode(rendered.prompt_ids).endswith("<think>\n")
    assert not find_in_rows(renderer, [([ASKED, said], None)], "d.jsonl")


def test_data_without_thoughts_for_a_prompt_that_opens_one_is_an_error_with_its_cure():
    (finding,) = find_in_rows(renderer_of("prompt opens a thought (R1)"), [(ROWS["plain"], None)], "d.jsonl")
    assert finding.severity == "error"
    assert "add the thoughts to the data, or set model.chat_template to a file without <think>" in finding.sentence
