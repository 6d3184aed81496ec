"""Tokenizers whose files say one thing and whose class another; tokens that are matched between words alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from spin_ray.errors import ModelError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, RenderError, load_tokenizer
from spin_ray.learner.hf_folder import copy_other_files
from spin_ray.learner.tokenizer_file import as_written, warn_of_other_tokens

TINY = "embedded:tiny-llama"


def fresh_tokenizer(template: str | None = None) -> Any:
    """A tiny tokenizer that a test may change."""
    tokenizer = load_tokenizer(resolve(TINY))
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_name_beside_a_token_that_is_none_beside_a_word_is_text():
    """``single_word`` asks for the characters around a token, which an alias must not change."""
    tokenizer = fresh_tokenizer()
    tokenizer.add_tokens([AddedToken("[x]", single_word=True, normalized=False)])
    renderer = ChatRenderer(tokenizer)
    messages = [user("[x]"), assistant("<|im_start|>[x]")]
    assert renderer.render(messages).prompt_ids == renderer.render_prompt(messages[:-1])
    assert tokenizer.convert_tokens_to_ids("[x]") in renderer.render(messages).real_ids
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in own["added_tokens"]:
        token["single_word"] = token["content"] == "<|im_end|>"
    strict = fresh_tokenizer()
    strict._tokenizer = Tokenizer.from_str(json.dumps(own))
    (found,) = ChatRenderer(strict).render_all([[user("a"), assistant("x<|im_end|>y")]])
    assert isinstance(found, RenderError) and "takes for the control token" in str(found)


def test_a_mark_that_is_no_token_beside_a_word_parts_no_texts():
    own = json.loads(fresh_tokenizer().backend_tokenizer.to_str())
    for token in own["added_tokens"]:
        token["single_word"] = token["content"] == "<|im_end|>"
    tokenizer = fresh_tokenizer("{% for m in messages %}{{ m.role + ' ' + m.content }}<|im_end|>{% endfor %}"
                                "{% if add_generation_prompt %}assistant {% endif %}")  # fmt: skip
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(own))
    renderer = ChatRenderer(tokenizer)
    assert renderer._ending is None, "what stands before the mark may change the tokens behind it"
    for asked in ("?", "</think>", "a<", "..."):
        (rendered,) = renderer.render_all([[user(asked), assistant("Yes.")]])
        ours = rendered.prompt_ids + rendered.real_ids
        whole = tokenizer.apply_chat_template([user(asked), assistant("Yes.")], return_dict=True)
        assert ours == whole["input_ids"][: len(ours)]


# Classes


def folder_of_class(folder: Path, name: str) -> Path:
    shutil.copytree(resolve(TINY), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GemmaTokenizer"])
def test_a_class_that_loses_or_fails_on_text_gives_way_to_tokenizer_json(tmp_path, name):
    """DeepSeek R1's distillates name LlamaTokenizerFast beside a byte-level tokenizer.json."""
    folder, text = folder_of_class(tmp_path / "model", name), "a\n\n b é"
    tokenizer, own = load_tokenizer(str(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False).ids
    plain, messages = fresh_tokenizer(), [user(text), assistant("c")]
    assert tokenizer.special_tokens_map == plain.special_tokens_map
    assert ChatRenderer(tokenizer).render(messages) == ChatRenderer(plain).render(messages)
    assert warn_of_other_tokens(tokenizer, folder) is None


def test_iterates_name_the_class_that_every_program_loads_alike(tmp_path):
    folder, text = folder_of_class(tmp_path / "model", "LlamaTokenizerFast"), "a\n\n b é"
    for config in ("config.json", None):  # an adapter has none
        target = tmp_path / f"iterate of {config}"
        target.mkdir()
        if config:
            shutil.copy(folder / config, target)
        copy_other_files(folder, target, with_code=False)
        theirs = AutoTokenizer.from_pretrained(target)
        assert theirs.encode(text) == load_tokenizer(str(folder)).encode(text), config
        assert theirs.decode(theirs.encode(text)) == text
        assert theirs.chat_template == fresh_tokenizer().chat_template
    untouched = folder_of_class(tmp_path / "other", "PreTrainedTokenizerFast")
    copy_other_files(untouched, target, with_code=False)
    assert (target / "tokenizer_config.json").read_bytes() == (untouched / "tokenizer_config.json").read_bytes()


def test_a_class_that_the_folder_does_not_name_is_refused_with_the_cure(tmp_path):
    folder = folder_of_class(tmp_path / "model", "LlamaTokenizerFast")
    loaded = LlamaTokenizer.from_pretrained(folder)  # as AutoTokenizer does before transformers 5.24
    folder = folder_of_class(tmp_path / "other", "Qwen2Tokenizer")
    with pytest.raises(ModelError, match=r"as a LlamaTokenizer, loses line breaks .*hf download NAME --local-dir"):
        as_written(loaded, folder)


def test_a_tokenizer_that_fails_on_a_text_is_named(tmp_path):
    folder = folder_of_class(tmp_path / "model", "GemmaTokenizer")  # its unknown token is not in the vocabulary
    with pytest.raises(ModelError, match="model: its tokenizer fails on a text"):
        ChatRenderer(AutoTokenizer.from_pretrained(folder))


def test_a_class_that_makes_other_tokens_is_told(tmp_path):
    folder = folder_of_class(tmp_path / "model", "LlamaTokenizerFast")
    said = str(warn_of_other_tokens(LlamaTokenizer.from_pretrained(folder), folder))
    assert "makes other tokens" in said and "'Hello, what is 12" in said
    assert "] in place of ['" in said, "both tokenizations are shown"
