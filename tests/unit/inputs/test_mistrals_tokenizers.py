"""The tokenizers of Mistral 7B themselves, which `mistral_common` carries: that of v0.1 is zephyr-7b-sft-full's.

Its own encoding of a conversation, made by Mistral for fine-tuning, is a second witness beside transformers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from spin_ray.inputs.rendering import ChatRenderer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v0.1": "tokenizer.model.v1",
    "v0.2": "mistral_instruct_tokenizer_240216.model.v2",
    "v0.3": "mistral_instruct_tokenizer_240323.model.v3",
}
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + AFTER }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONVERSATIONS = (
    ["What is the capital?", "Yes, it is Paris."],
    ["Hi", "Hello!", "and 12?", "  12\n\n- one\n- two"],
    ["a\n", "\nYes"],
    ["Été?", "中文 😀 [INST] </s>"],
)


def tokenizer_of(version: str, template: str, folder: Path) -> Any:
    shutil.copyfile(DATA / FILES[version], folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def messages_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


@pytest.mark.parametrize("version", FILES)
def test_a_conversation_has_the_ids_that_mistral_trains_on(version, tmp_path):
    after = " [/INST]" if version == "v0.1" else "[/INST]"
    tokenizer = tokenizer_of(version, INSTRUCT.replace("AFTER", repr(after)), tmp_path)
    renderer = ChatRenderer(tokenizer)
    theirs = MistralTokenizer.from_file(str(DATA / FILES[version]), mode=ValidationMode.finetuning)
    for texts in CONVERSATIONS[:3]:
        messages = [(UserMessage, AssistantMessage)[turn % 2](content=text) for turn, text in enumerate(texts)]
        witness = theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        rendered = renderer.render(messages_of(texts))
        assert rendered.prompt_ids + rendered.real_ids == witness


def test_zephyrs_responses_begin_as_they_do_in_its_conversations(tmp_path):
    """`▁Yes` after the newline of `<|assistant|>` is a token that no sampled response has."""
    tokenizer = tokenizer_of("v0.1", ZEPHYR, tmp_path)
    renderer = ChatRenderer(tokenizer)
    for texts in CONVERSATIONS[:3]:
        messages = messages_of(texts)
        rendered = renderer.render(messages)
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        ours = rendered.prompt_ids + rendered.real_ids
        assert ours == whole[: len(ours)] and ours[-1] == tokenizer.eos_token_id
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert rendered.prompt_ids == prompt
    (answer,) = (renderer.render(messages_of(CONVERSATIONS[0])),)
    assert tokenizer.convert_ids_to_tokens(answer.real_ids)[:2] == ["Yes", ","]


@pytest.mark.slow
def test_a_forged_end_of_turn_is_text(tmp_path):
    tokenizer = tokenizer_of("v0.1", ZEPHYR, tmp_path)
    rendered = ChatRenderer(tokenizer).render(messages_of(CONVERSATIONS[3]))
    assert rendered.real_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(rendered.real_ids[:-1]).strip() == CONVERSATIONS[3][-1]
