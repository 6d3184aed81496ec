"""Small tokenizers of every kind, trained here, and templates that end prompts in every way."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Yes, the answer is Paris.", "Hello, it is France and the capital of the country is Paris.",
    "Twelve is the number that you asked the assistant for.", "The assistants said: Yes or No?", "No. I do not know.",
    "Assistant: Yes\nUser: What is 12 + 7?\nAssistant: It is 19.\n\nUser: thanks!", "1. one\n2. two\n\n- three (3)",
    "user assistant model system said anthem answer assist an ant", "### Response:\nThe cat sat on the mat. \"Why?\"",
] * 4  # fmt: skip
KINDS = ("metaspace first", "metaspace always", "metaspace never", "prepend", "byte level", "byte level prefix",
         "unigram", "wordpiece")  # fmt: skip


@cache
def _trained(kind: str) -> Tokenizer:
    if kind.startswith("byte level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "prepend":  # Llama 2 and Mistral v0.1, as converted at first: no word is parted from the next
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            scheme = kind.split()[1]
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIAL + fallback, max_token_length=12, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        return _without_added(tokenizer, fallback)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _without_added(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """Removes byte pieces from the added tokens but not from the vocabulary, as in sentencepiece models."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(spec))


def tokenizer_of_kind(kind: str, template: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind).to_str()),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        name_or_path=kind,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
TEMPLATES = {
    "newline": _TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "control token": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
    "blank": "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "word": "{% for m in messages %}{{ m['role'] + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}",
    "zephyr": "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "llama 2": "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}",
    "llama 3": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_end|>\n\n' + m['content'] | trim + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}",
    "no mark": "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
}  # fmt: skip


@contextmanager
def transformers_date(date: datetime) -> Iterator[None]:
    """Sets the clock of transformers' own function ``strftime_now``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: date))
        yield


def template_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Returns the ids that transformers makes of the conversation by itself."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])
