"""The date in a template: what transformers' own ``strftime_now`` writes on that day."""

from datetime import datetime

import pytest
from transformers import AutoTokenizer

from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.template_variables import TemplateVariables
from tests.support.tokenizer_kinds import transformers_date

DAY = datetime(2024, 7, 6, 3, 4, 5)
TEMPLATES = {
    "directives and flags": "{{ strftime_now('%d %b %Y %% %-d %%d %A %H:%M %j %^B|%c|%n|%Ey|%') }}",
    "begins with a block after blanks": "  \n  {% if true %}\n{{ strftime_now('%d') }}\n{% endif %}\nx",
    "begins with a line break": "\n{{ strftime_now('%Y') + 'a' }}{{ strftime_now('%m') | int + 1 }}",
    "Llama 3.2": "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
                 "        {%- set date_string = strftime_now(\"%d %b %Y\") %}\n    {%- else %}\n"
                 "        {%- set date_string = \"26 Jul 2024\" %}\n    {%- endif %}\n{%- endif %}\n{{- date_string }}",
    "in a macro": "{% macro day(x) %}{{ strftime_now(format=x) | upper }}{% endmacro %}{{ day('%b') }}{{ day('%d') }}",
    "in a loop": "{% for message in messages %}{% set at = strftime_now('%Y-%m-%d') %}{{ at.split('-') }}{% endfor %}",
    "a name of its own": "{% set strftime_now = 'never' %}{{ strftime_now }}",
    "no date": "{{ messages[0].content }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_the_given_date_as_transformers_writes_today(name):
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    tokenizer.chat_template = TEMPLATES[name]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with transformers_date(DAY):
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
    with transformers_date(datetime(1999, 1, 1)):
        arguments = TemplateVariables({}, DAY).arguments(tokenizer)
        assert tokenizer.apply_chat_template(messages, tokenize=False, **arguments) == expected


def test_a_template_for_tools_has_the_date_too():
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    tokenizer.chat_template = {
        "default": "{{ strftime_now('%d') }}",
        "tool_use": "tools {{ strftime_now('%d') }}{{ a }}",
    }
    tools, variables = [{"type": "function", "function": {"name": "f"}}], TemplateVariables({"a": 1}, DAY)
    arguments = variables.arguments(tokenizer, tools, {"a": 2})
    said = [{"role": "user", "content": "?"}]
    assert tokenizer.apply_chat_template(said, tools=tools, tokenize=False, **arguments) == "tools 062"
