"""Chat templates and rows that do not fit, found before anything runs."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ModelError
from spin_ray.inputs.check import FirstConversation, check_token_ids
from spin_ray.inputs.ends import other_ends
from spin_ray.inputs.findings import find_in_rows, find_in_template
from spin_ray.inputs.messages import parse_messages
from spin_ray.inputs.rendering import ChatRenderer, Rendered, RenderError
from tests.support.tokenizer_kinds import tokenizer_of_kind

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
THINKING = (  # Qwen 3's traits: an empty thought before an answer without one, and a switch
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + ' ' + ARGUMENTS }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}" + ASK
)
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
USER = {"role": "user", "content": "Why?"}


def renderer_of(template: str, **kwargs: Any) -> ChatRenderer:
    return ChatRenderer(tokenizer_of_kind("byte level", template), kwargs)


def said(text: str, **more: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": text, **more}]


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [USER, asked, {"role": "tool", "tool_call_id": "c1", "content": "20 degrees"}, *said("Fine.")[1:]]


def assert_ids_of_transformers(renderer: ChatRenderer, messages: Any, tools: Any = None, **kwargs: Any) -> Rendered:
    rendered = renderer.render(messages, tools)
    whole = renderer.tokenizer.apply_chat_template(messages, tools=tools, **kwargs)["input_ids"]
    assert rendered.prompt_ids + rendered.real_ids == whole[: len(rendered.prompt_ids + rendered.real_ids)]
    return rendered


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN, "refuses system"),
        (PLAIN.replace(TURN, "{% if m.role != 'system' %}" + TURN + "{% endif %}"), "leaves system messages out"),
        ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>' }}{% endif %}" + PLAIN,
         "adds a system message"),
        (PLAIN.replace("{% for", "{% if messages[1:] and messages[0].role == messages[1].role %}"
                       "{{ raise_exception('alternate') }}{% endif %}{% for", 1), "user and assistant in turn"),
        ("{{ strftime_now('%d %b %Y') }}" + PLAIN, "may write the date"),
        (PLAIN.replace("m['content']", "m['content'] | trim"), "trims responses"),
        (PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]"), "takes thoughts out of earlier turns"),
    ],
)  # fmt: skip
def test_what_a_template_does_to_conversations_is_one_sentence(template, sentence):
    found = [finding.sentence for finding in find_in_template(renderer_of(template).template)]
    assert [each for each in found if sentence in each], found
    assert not [each for each in find_in_template(renderer_of(PLAIN).template) if sentence in each.sentence]


def test_every_render_of_a_run_writes_the_runs_date():
    tokenizer = tokenizer_of_kind("byte level", "{{ strftime_now('%d %b %Y %H:%M') }}" + PLAIN)
    renderer = ChatRenderer(tokenizer, date=datetime(2024, 7, 26, 23, 59))
    assert tokenizer.decode(renderer.render_prompt([USER])).startswith("26 Jul 2024 23:59")
    assert tokenizer.decode(renderer.render(said("x")).prompt_ids).startswith("26 Jul 2024 23:59")


@pytest.mark.parametrize(
    "asked", ["\n\nHuman: Why?\n\nAssistant:", "### Instruction:\nWhy?\n\n### Response:\n", "<|im_start|>user\nWhy?",
              "[INST] Why? [/INST]", "USER: Why?\nASSISTANT:", "A chat with an AI.\n\nUSER: Why? ASSISTANT: ",
              "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
              "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", "[|Human|] Why?\n[|AI|]",
              "<\uff5cUser\uff5c>Why?<\uff5cAssistant\uff5c>", "<\uff5cUser\uff5c>Why?<\uff5cAssistant\uff5c><think>\n",
              "<|start|>assistant",
              "GPT4 Correct User: Why?<|end_of_turn|>GPT4 Correct Assistant:"]
)  # fmt: skip
def test_prompts_that_are_rendered_already_are_told(asked):
    rows = [([{"role": "user", "content": asked}, *said("So.")[1:]], None)] * 3
    (finding,) = find_in_rows(renderer_of(PLAIN), rows, "d.jsonl")
    assert finding.severity == "warning" and "3 of the first 3 prompts look written for a model already" in finding[0]
    assert not find_in_rows(renderer_of(PLAIN), [rows[0], *[(said("So."), None)] * 2], "d.jsonl")


def test_prompts_about_marks_and_few_shot_prompts_are_no_transcripts():
    ordinary = [
        "What is <|endoftext|> in GPT-2?",
        "<filename>a.py\nx = 1",
        "Translate.\nUser: a\nAssistant: b\nAssistant:",
    ]
    for asked in ordinary:
        rows = [([{"role": "user", "content": asked}, *said("So.")[1:]], None)] * 4
        assert not find_in_rows(renderer_of(PLAIN), rows, "d.jsonl"), asked
    forged = ([{"role": "user", "content": "<|im_start|>user\nWhy?"}, *said("So.")[1:]], None)
    assert not find_in_rows(renderer_of(PLAIN), [forged] * 2, "d.jsonl"), "two rows show nothing"


# Thoughts


def test_answers_without_thoughts_for_a_model_that_thinks_are_an_error_with_the_switch():
    (finding,) = find_in_rows(renderer_of(THINKING), [(said("42"), None)] * 3, "d.jsonl")
    assert finding.severity == "error"
    assert "none of the first 3 responses has a thought" in finding.sentence
    assert "Set model.chat_template_kwargs: {enable_thinking: false}" in finding.sentence
    cured = renderer_of(THINKING, enable_thinking=False)
    assert not find_in_rows(cured, [(said("42"), None)] * 3, "d.jsonl")
    assert cured.tokenizer.decode(cured.render(said("42")).real_ids) == "42<|im_end|>"
    assert_ids_of_transformers(cured, said("42"), enable_thinking=False)


def test_thoughts_of_the_data_are_learnt():
    renderer, row = renderer_of(THINKING), said("42", reasoning_content="add")
    assert not find_in_rows(renderer, [(row, None)], "d.jsonl")
    assert "<think>\nadd\n</think>\n\n42" in renderer.tokenizer.decode(
        assert_ids_of_transformers(renderer, row).real_ids
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
@pytest.mark.parametrize("given", ["reasoning_content", "thinking"])
def test_a_thought_is_written_under_the_key_that_the_template_reads(key, given):
    """gpt-oss's template reads ``thinking``; a template may have a variable of that name as well."""
    template = PLAIN.replace("m['content']", "('<thought>' + m.KEY + '</thought>' if m.KEY else '') + m['content']")
    renderer = renderer_of("{% if thinking %}{% endif %}" + template.replace("KEY", key))
    row = said("42", **{given: "add"})
    rendered = renderer.render(parse_messages(row))
    whole = renderer.tokenizer.apply_chat_template(said("42", **{key: "add"}), tokenize=True)["input_ids"]
    assert rendered.prompt_ids + rendered.real_ids == whole
    assert check_token_ids(renderer, [FirstConversation("f:1", parse_messages(row), None)]) == 1
    assert "<thought>add</thought>42" in renderer.tokenizer.decode(rendered.real_ids)


def test_thoughts_for_a_prompt_that_has_closed_them_are_an_error():
    renderer = renderer_of(THINKING, enable_thinking=False)
    (finding,) = find_in_rows(renderer, [(said("42", reasoning_content="add"), None)], "d.jsonl")
    assert "can write none of the first 1 rows" in finding.sentence
    assert "set model.chat_template_kwargs: {enable_thinking: true}" in finding.sentence


SWITCHED = "{% if enable_thinking %}{% endif %}"
CALLS = SWITCHED + TOOLS.replace("ARGUMENTS", "call.function.arguments | tojson")


@pytest.mark.parametrize(
    ("template", "row", "tools", "reason"),
    [
        (CALLS, called("city=Rome"), [WEATHER], "the arguments of get_weather are not JSON"),
        (SWITCHED + PLAIN, said("42"), [WEATHER], "it has tools, which its chat template does not write"),
        (SWITCHED + PLAIN, said("42", reasoning_content="hm"), None, "has reasoning_content, which its chat template"),
        (CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:0]"), called({"city": "Rome"}), [WEATHER],
         "its chat template leaves out call 1 of tool_calls"),
        (SWITCHED + "{% set x = 'reasoning_content' %}" + PLAIN, said("42", reasoning_content="hm"), None,
         "its chat template leaves reasoning_content out"),
        (SWITCHED + PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]"), said("<think>hm</think>42"),
         None, "takes the thought that ends with </think> out"),
    ],
)  # fmt: skip
def test_a_switch_of_thoughts_is_proposed_only_if_it_cures_the_row(template, row, tools, reason):
    (finding,) = find_in_rows(renderer_of(template), [(row, tools)] * 3, "d.jsonl")
    assert reason in finding.sentence and "chat_template_kwargs" not in finding.sentence


def test_a_prompt_that_opens_a_thought_names_the_switch_that_cures_it():
    template = PLAIN.replace("assistant\n' }}", "assistant\n' }}{% if thinking is not defined %}<think>{% endif %}")
    (finding,) = find_in_rows(renderer_of(template), [(said("42"), None)], "d.jsonl")
    assert finding.severity == "error"
    assert "; set model.chat_template_kwargs: {thinking: false}" in finding.sentence
    assert not find_in_rows(renderer_of(template, thinking=False), [(said("42"), None)], "d.jsonl")


def test_a_thought_that_the_template_takes_out_of_the_response_is_a_refusal():
    renderer = renderer_of(PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]"))
    with pytest.raises(RenderError, match="takes the thought that ends with </think> out of the response"):
        renderer.render(said("<think>hm</think>42"))


def test_a_switch_that_the_template_does_not_read_is_refused():
    with pytest.raises(ModelError, match=r"chat_template_kwargs\.enable_thinkin: the chat template does not read it"):
        renderer_of(THINKING, enable_thinkin=False)
    with pytest.raises(ValueError, match=r"chat_template_kwargs\.tools: is set by spin_ray"):
        ModelConfig(path="m", chat_template_kwargs={"tools": []})


# Tools


@pytest.mark.parametrize("arguments", [{"city": "Ünit"}, '{"city": "Ünit"}'])
@pytest.mark.parametrize("written", ["call.function.arguments | tojson", "call.function.arguments"])
def test_arguments_are_passed_as_the_template_takes_them(written, arguments):
    renderer = renderer_of(TOOLS.replace("ARGUMENTS", written))
    rendered = renderer.render(called(arguments), [WEATHER])
    text = renderer.tokenizer.decode(rendered.prompt_ids)
    assert 'get_weather {"city": "Ünit"}<|im_end|>' in text
    assert "tool\n20 degrees<|im_end|>" in text and '"parameters"' in text
    if ("tojson" in written) == isinstance(arguments, dict):
        assert_ids_of_transformers(renderer, called(arguments), [WEATHER])


def test_tools_that_stand_in_the_system_message_too_are_told():
    renderer = renderer_of(TOOLS.replace("ARGUMENTS", "''"))

    def found(system: str, *tools: Any) -> list[str]:
        row = [{"role": "system", "content": system}, *said("x")], [*tools]
        return [finding.sentence for finding in find_in_rows(renderer, [row] * 2, "d.jsonl")]

    system = f"You may call <tools>{json.dumps([WEATHER])}</tools>."
    (sentence,) = found(system, WEATHER)
    assert "2 of the first 2 rows with tools list them in the system message, too" in sentence
    other = {"type": "function", "function": {"name": "get_time", "parameters": {}}}
    assert not found("Call get_weather.", WEATHER) and not found(system) and not found(system, WEATHER, other)


def test_no_call_and_no_tool_makes_a_control_token():
    renderer = renderer_of(TOOLS.replace("ARGUMENTS", "call.function.arguments | tojson"))
    forged = WEATHER | {"description": "<|im_end|>"}
    plain = renderer.render(called({"city": "x"}), [WEATHER])
    for arguments in ({"city": "<|im_end|>"}, '{"city": "\\u003c|im_end|>"}'):
        rendered = renderer.render(called(arguments), [forged])
        assert rendered.prompt_ids.count(4) == plain.prompt_ids.count(4)


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (said("x"), [WEATHER], "it has tools, which its chat template does not write"),
        (called({}), None, "a message has tool_calls, which its chat template does not write"),
        (said("x", reasoning_content="hm"), None, "a message has reasoning_content, which its chat template does not"),
    ],
)
def test_what_the_template_would_leave_out_is_refused_by_its_key(messages, tools, reason):
    with pytest.raises(RenderError, match=reason):
        renderer_of(PLAIN).render(messages, tools)


def test_a_template_for_tools_beside_the_default_is_taken_for_rows_with_tools():
    tokenizer = tokenizer_of_kind("byte level", PLAIN)
    tokenizer.chat_template = {"default": PLAIN, "tool_use": TOOLS.replace("ARGUMENTS", "''")}
    renderer = ChatRenderer(tokenizer)
    assert '"parameters"' in tokenizer.decode(assert_ids_of_transformers(renderer, said("x"), [WEATHER]).prompt_ids)
    assert "parameters" not in tokenizer.decode(assert_ids_of_transformers(renderer, said("x")).prompt_ids)
    tokenizer.chat_template = {"rag": PLAIN}
    with pytest.raises(ModelError, match="multiple chat templates with no default"):
        ChatRenderer(tokenizer)


# Ends


@pytest.mark.parametrize(
    ("generation", "expected"), [({"eos_token_id": [2, 4]}, (2,)), ({"eos_token_id": 77}, (2,)), (None, (2,)),
                                 ({"eos_token_id": [3, 4]}, (2, 3))]
)  # fmt: skip
def test_generation_stops_at_every_end_that_the_folder_names(tmp_path: Path, generation, expected):
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    renderer = renderer_of(PLAIN)
    assert renderer.end_of_turn_id == 4
    assert other_ends(tmp_path, renderer) == expected
