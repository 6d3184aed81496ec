"""Chat templates that leave texts alone, and those that do not: where one is taken for such, its words must not differ.

The templates are those of well-known models, shortened where they say the same again.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.inputs.rendering import ChatRenderer, RenderError
from spin_ray.inputs.templates import Skeletons
from spin_ray.inputs.templates.copying import copies_texts
from tests.unit.inputs.test_rendering import assistant, fresh_tokenizer, hostile_text, user

END = "<|im_end|>"
COPYING = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ 'You are 100% "
    "helpful<|im_end|>' }}{% endif %}{{'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] "
    "+ eos_token }}\n{% else %}\n{{ '<|assistant|>\n' ~ message['content'] ~ eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header|>'"
    " + message['role'] + '\n\n'+ message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}{% set content = "
    "bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header|>assistant\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<|im_start|>' + role + '\n' + "
    "message['content'].strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>model\n'}}{% endif %}",
    "first message apart": "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = "
    "messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% if first %}[{{ first }}]"
    "{% endif %}{% for m in rest if m.role is defined and 'tool_calls' not in m %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt and rest | length == 0 %}?{% endif %}",
}
LOOKING = {
    "cuts": "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    "asks": "{% for m in messages %}{% if 'x' in m.content %}a{% endif %}{% endfor %}",
    "compares": "{% for m in messages %}{% if m.content == 'x' %}a{% endif %}{% endfor %}",
    "counts": "{% for m in messages %}{{ m.content | length }}{% endfor %}",
    "changes": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "formats": "{% for m in messages %}{{ '%s' % m.content }}{% endfor %}",
    "repeats": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "dumps": "{{ messages | tojson }}",
    "writes a message": "{% for m in messages %}{{ m }}{% endfor %}",
    "all values": "{% for m in messages %}{% for key, value in m.items() %}{{ value }}{% endfor %}{% endfor %}",
    "the message before": "{% for m in messages %}{{ loop.previtem.content | upper }}{% endfor %}",
    "another way to the text": "{% for m in messages %}{{ m.get('content')[0] }}{% endfor %}",
    "a key that is worked out": "{% for m in messages %}{{ m['con' + 'tent'][0] }}{% endfor %}",
    "a letter": "{% for m in messages %}{{ m.content[0] }}{% endfor %}",
    "in a namespace": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = m.content %}{% endfor %}"
    "{{ n.x[0] }}",
    "in a list": "{% for m in messages %}{% set l = [m.content] %}{{ l[0][0] }}{% endfor %}",
    "under a name that is set further down": "{% for m in messages %}{{ x | upper }}{% set x = m.content %}"
    "{% endfor %}",
    "in a macro": "{% macro f(m) %}{{ m.content[0] }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "in a block": "{% for m in messages %}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}",
    "in a captured block": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | upper }}{% endfor %}",
    "empty once stripped": "{% for m in messages %}{% if m.content | trim %}a{% endif %}{% endfor %}",
    "strips what is around, too": "{% for m in messages %}{{ (' a' + m.content) | trim }}{% endfor %}",
    "tells the time": "{{ strftime_now('%H:%M:%S') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "is broken": "{% for",
}


@pytest.mark.parametrize("name", COPYING)
def test_templates_that_copy_texts_are_known_as_such(name):
    assert copies_texts(COPYING[name])


@pytest.mark.parametrize("name", LOOKING)
def test_templates_that_look_at_texts_are_told_from_them(name):
    assert not copies_texts(LOOKING[name])


def test_the_embedded_models_templates_copy():
    assert ChatRenderer(fresh_tokenizer()).template._skeletons.write([user("a"), assistant("b")]) is not None


def test_a_template_that_is_no_text_is_always_asked():
    """transformers takes several templates under names, too."""
    assert Skeletons.of({"default": COPYING["chatml"]}, lambda *_: "x").write([user("a"), assistant("b")]) is None


texts = hostile_text | st.sampled_from(["", " ", "\u2003", " x\n", "%s", "100%", "\ue0020\ue003", END])
messages = st.builds(dict, role=st.sampled_from(["system", "user", "assistant"]), content=texts)
conversations = st.lists(messages, max_size=4).flatmap(
    lambda before: st.tuples(texts, texts).map(lambda last: [*before, user(last[0]), assistant(last[1])])
)


@pytest.fixture(scope="module")
def renderers():
    """For each template, a renderer that may write by itself, and one that always asks the template."""
    both = {}
    for name, template in COPYING.items():
        both[name] = (ChatRenderer(fresh_tokenizer(template)), ChatRenderer(fresh_tokenizer(template)))
        both[name][1].template._skeletons = Skeletons(None)
    return both


@pytest.mark.slow
@pytest.mark.parametrize("name", COPYING)
@settings(max_examples=40, deadline=None)
@given(found=st.lists(conversations, min_size=1, max_size=4))
def test_what_is_written_by_roles_is_what_the_template_writes(renderers, name, found):
    """Prompts, responses and refusals, whatever the texts are."""
    quick, plain = (renderer.render_all([*found, *found]) for renderer in renderers[name])
    assert [str(each) for each in quick] == [str(each) for each in plain]
    assert name != "chatml" or not any(isinstance(each, RenderError) for each in quick)


def test_a_template_is_asked_once_for_each_sequence_of_roles():
    asked = []

    def ask(messages, add_generation_prompt):
        asked.append([message["role"] for message in messages])
        return "".join(f"<{message['content']}>" for message in messages)

    skeletons = Skeletons(ask)
    for number in range(9):
        assert skeletons.write([user(f"{number}%"), assistant("b")]) == (f"<{number}%>", "<b>")
    assert asked == [["user"], ["user", "assistant"]]
    assert skeletons.write([user(""), assistant("b")]) == ("<>", "<b>")
    assert len(asked) == 4, "an empty text may be written otherwise"


@pytest.mark.parametrize("ask", [
    lambda messages, prompt: None,
    lambda messages, prompt: f"{len(messages)}" + "".join(message["content"] for message in messages),
    lambda messages, prompt: "".join(message["content"].lstrip() for message in messages),
    lambda messages, prompt: "".join(message["content"].replace("\ue002", "") for message in messages),
], ids=["refuses", "begins otherwise once an answer follows", "strips one side", "damages the marks"])  # fmt: skip
def test_what_does_not_follow_from_roles_is_left_to_the_template(ask):
    assert Skeletons(ask).write([user("a"), assistant("b")]) is None


def test_a_message_that_has_more_than_role_and_text_is_left_to_the_template():
    skeletons = Skeletons(lambda messages, prompt: "".join(message["content"] for message in messages))
    assert skeletons.write([user("a"), assistant("b")]) == ("a", "b")
    assert skeletons.write([user("a") | {"name": "n"}, assistant("b")]) is None
