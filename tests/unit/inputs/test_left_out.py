"""What a chat template leaves out of a conversation refuses its row, in whichever message it stands."""

from typing import Any

import pytest

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.left_out import LeftOut
from spin_ray.inputs.prompt_rows import PromptTask, rows_of
from spin_ray.inputs.rendering import ChatRenderer, Rendered, RenderError
from spin_ray.inputs.sources import SourceRow
from tests.support.tokenizer_kinds import tokenizer_of_kind

S, E = "<|im_start|>", "<|im_end|>"
TURN = f"{S}{{{{ m.role }}}}\n{{{{ m.content }}}}"
ASK = f"{{% if add_generation_prompt %}}{S}assistant\n{{% endif %}}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
EACH = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
WRITES_ALL = f"{EACH}{TURN}{CALLS}{E}{{% endfor %}}{ASK}"
CALL_OR_TEXT = (  # Llama 3.1, Mistral 7B v0.3
    f"{EACH}{{% if m.tool_calls %}}{S}assistant\n{CALLS}{{% else %}}{TURN}{{% endif %}}{E}{{% endfor %}}{ASK}"
)
FIRST_CALL = WRITES_ALL.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")  # gpt-oss
EARLIER_CALLS_WITHOUT_TEXT = WRITES_ALL.replace(  # Command A
    "{{ m.content }}", "{% if loop.last or not m.tool_calls %}{{ m.content }}{% endif %}"
)
NO_ARGUMENTS = WRITES_ALL.replace("{{ c.function.arguments | tojson }}", "{}")
FIRST_SYSTEM = (  # Qwen 3 VL, Phi 4, Falcon H1, Alpaca
    "{% for m in messages %}{% if loop.first or m.role != 'system' %}" + f"{TURN}{E}{{% endif %}}{{% endfor %}}{ASK}"
)
ONE_OF_SYSTEM_AND_DEVELOPER = (  # gpt-oss
    "{% for m in messages %}{% if loop.first or m.role not in ['system', 'developer'] %}"
    f"{TURN}{E}{{% endif %}}{{% endfor %}}{ASK}"
)
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
ASKED: Any = {"role": "user", "content": "What is it?"}
SAID: Any = {"role": "assistant", "content": "Paris."}
SEEN: Any = {"role": "tool", "content": "20"}
SYSTEM, DEVELOPER = ({"role": role, "content": "Be good."} for role in ("system", "developer"))


def calling(text: str, *arguments: Any) -> Any:
    calls = [{"type": "function", "function": {"name": "look", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def renderer_of(template: str) -> ChatRenderer:
    return ChatRenderer(tokenizer_of_kind("byte level", template))


LOST = {
    "text beside a call of the response": (
        CALL_OR_TEXT, [ASKED, calling("I look.", {"at": "x"})], r"message 1 \(assistant\): .* leaves out the text"
    ),
    "text beside a call before": (
        CALL_OR_TEXT, [ASKED, calling("I look.", {"at": "x"}), SEEN, SAID], r"message 1 .* leaves out the text"
    ),
    "text beside a call before alone": (
        EARLIER_CALLS_WITHOUT_TEXT, [ASKED, calling("I look.", {"at": "x"}), SEEN, SAID], r"message 1 .* the text"
    ),
    "second call": (
        FIRST_CALL, [ASKED, calling("", {"at": "x"}, {"at": "y"}), SEEN, SEEN, SAID],
        r"message 1 .* leaves out call 2 of tool_calls",
    ),
    "arguments": (
        NO_ARGUMENTS, [ASKED, calling("", {"at": "x"})], r"message 1 .* the arguments of call 1 of tool_calls"
    ),
    "second system message": (
        FIRST_SYSTEM, [SYSTEM, SYSTEM, ASKED, SAID], r"message 1 \(system\): its chat template leaves out the text"
    ),
    "later system message": (FIRST_SYSTEM, [ASKED, SAID, SYSTEM, ASKED, SAID], r"message 2 \(system\)"),
    "developer behind system": (
        ONE_OF_SYSTEM_AND_DEVELOPER, [SYSTEM, DEVELOPER, ASKED, SAID], r"message 1 \(developer\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_row_of_which_a_part_would_be_lost_is_refused_by_the_message(name):
    template, messages, reason = LOST[name]
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    with pytest.raises(RenderError, match=reason):
        renderer_of(template).render(messages, tools)
    assert renderer_of(WRITES_ALL).render(messages, tools)


@pytest.mark.parametrize("name", ["text beside a call before", "second call", "later system message"])
def test_a_prompt_of_which_a_part_would_be_lost_is_refused(name):
    """Questions and serving render prompts alone."""
    template, messages, reason = LOST[name]
    with pytest.raises(RenderError, match=reason):
        renderer_of(template).render_prompt(messages[:-1])
    assert renderer_of(WRITES_ALL).render_prompt(messages[:-1])


READS_TOOLS = (  # Command A: words of its own for conversations with tools, but not the tools
    "{% if tools %}Use tools.{% endif %}" + WRITES_ALL.removeprefix("{% if tools %}{{ tools | tojson }}{% endif %}")
)
FIRST_TOOL = WRITES_ALL.replace("{{ tools | tojson }}", "{{ tools[0] | tojson }}")
OTHER: Any = {"name": "other", "parameters": {}}


@pytest.mark.parametrize(
    ("template", "tools"),
    [(READS_TOOLS, [TOOL]), (READS_TOOLS, [OTHER]), (FIRST_TOOL, [TOOL, TOOL]), (FIRST_TOOL, [TOOL, OTHER])],
)
def test_tools_that_a_template_asks_for_but_does_not_write_refuse_the_row(template, tools):
    renderer = renderer_of(template)
    assert template is READS_TOOLS or isinstance(renderer.render([ASKED, SAID], tools[:1]), Rendered)
    for written in (renderer.render_all([[ASKED, SAID]], [tools]), renderer.render_prompts([[ASKED]], [tools])):
        assert "it has tools, which its chat template does not write" in str(written[0])
    assert renderer.render([ASKED, SAID])
    assert isinstance(renderer_of(WRITES_ALL).render([ASKED, SAID], tools), Rendered)


KEPT = {
    "no text beside a call": (CALL_OR_TEXT, [ASKED, calling("", {"at": "x"}), SEEN, SAID]),
    "one call": (FIRST_CALL, [ASKED, calling("", {"at": "x"}), SEEN, SAID]),
    "no arguments": (NO_ARGUMENTS, [ASKED, calling("", {}), SEEN, SAID]),
    "one system message": (FIRST_SYSTEM, [SYSTEM, ASKED, SAID]),
    "thoughts of earlier turns": (
        WRITES_ALL.replace("{{ m.content }}", "{{ m.reasoning_content if loop.last }}{{ m.content }}"),
        [ASKED, SAID | {"reasoning_content": "hm"}, ASKED, SAID | {"reasoning_content": "first"}],
    ),
    "capitals": (
        WRITES_ALL.replace("m.content", "m.content | upper if m.role != 'assistant' else m.content"),
        [SYSTEM, ASKED, SAID, ASKED, SAID],
    ),
    "trimmed": (WRITES_ALL.replace("m.content", "m.content | trim"), [SYSTEM, ASKED, SAID, ASKED, SAID]),
    "written as JSON": (WRITES_ALL.replace("m.content", "m.content | tojson"), [SYSTEM, ASKED, SAID]),
    "an answer of a tool, written only behind a call (Gemma 4)": (
        WRITES_ALL.replace(TURN, "{% if m.role != 'tool' or loop.previtem.tool_calls %}" + TURN + "{% endif %}"),
        [ASKED, calling("", {"at": "x"}), SEEN, SAID],
    ),
    "arguments as text": (WRITES_ALL, [ASKED, calling("", '{"at": "x"}'), SEEN, SAID]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_row_that_is_written_whole_is_usable(name):
    template, messages = KEPT[name]
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    (rendered,) = renderer_of(template).render_all([messages], [tools])
    assert isinstance(rendered, Rendered), str(rendered)


def test_what_a_template_refuses_is_told_in_its_words():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WRITES_ALL
    with pytest.raises(RenderError, match="no system"):
        renderer_of(template).render([SYSTEM, ASKED, SAID])


def test_a_template_is_asked_once_for_each_sequence_of_roles_and_keys():
    asked: list[Any] = []

    def ask(messages: Any, add_generation_prompt: bool, tools: Any) -> str:
        asked.append([message["content"] for message in messages])
        return "".join(message["content"] for message in messages if message["role"] != "tool")

    left_out = LeftOut(ask)
    for number in range(9):
        assert left_out.find([ASKED | {"content": f"{number}?"}, SAID], None, False) is None
        assert "message 2 (tool)" in (left_out.find([ASKED, SAID, SEEN | {"name": f"n{number}"}], None, False) or "")
    assert len(asked) == 2 and len({text for texts in asked for text in texts}) == 3
    assert left_out.find([ASKED, SAID | {"content": ""}], None, False) is None and len(asked) == 3


def test_a_refusal_of_one_rows_values_says_nothing_of_the_next_row():
    """Mistral's templates refuse ids of calls that do not have nine characters."""

    def ask(messages: Any, add_generation_prompt: bool, tools: Any) -> str | None:
        return None if messages[-1]["tool_call_id"] == "call_1" else messages[-1]["content"]

    left_out = LeftOut(ask)
    assert left_out.find([ASKED, SEEN | {"tool_call_id": "call_1"}], None, False) is None
    assert "message 0 (user)" in (left_out.find([ASKED, SEEN | {"tool_call_id": "abcdefghi"}], None, False) or "")


def test_a_row_of_which_a_part_is_left_out_goes_to_quarantine_as_one_of_the_templates(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(FIRST_SYSTEM)
    task = PromptTask(resolve("embedded:tiny-llama"), str(path), False, 128, DataConfig(train="d"))
    given = {"messages": [ASKED, SAID, SYSTEM, ASKED, SAID]}
    (unusable,) = rows_of([SourceRow("d:1", given, b"")], task)
    assert isinstance(unusable, Unusable)
    assert unusable.reason == "template" and unusable.detail.startswith("message 2 (system): its chat template")
