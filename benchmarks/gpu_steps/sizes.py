"""Models, lengths and pairs of the steps: real ones for a card, toy ones for a rehearsal."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gpu_steps.child import Context
from spin_ray.planning.hardware import DEVICE_NAMES, GPUS
from spin_ray.planning.learner_cost import needed_flops
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.work import visible_pairs
from spin_ray.run_dir.schemas import PAIR_SCHEMA

SPREAD = 0.45
"""Sigma of log-normal lengths."""
CHAT, LONG, SHORT = "130/256", "400/300", "30/20"
"""Mean tokens of a prompt / of each response."""
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "0.1B": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llamas with the sizes of Qwen2.5-1.5B and Mistral-7B, and a small one."""
TINY_SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    pack_lengths: tuple[int, ...]
    train_pack: int
    pairs: int
    steps: int
    warm_up: int
    shrink: int
    """Divisor of all lengths."""
    longest: int


CARD = Sizes(pack_lengths=(4096, 8192), train_pack=8192, pairs=64, steps=3, warm_up=2, shrink=1, longest=2048)
TOY = Sizes(pack_lengths=(128,), train_pack=128, pairs=4, steps=1, warm_up=1, shrink=10, longest=96)


def sizes_of(context: Context) -> Sizes:
    return TOY if context.tiny else CARD


def device_of(context: Context) -> torch.device:
    return torch.device("cpu" if context.tiny else "cuda")


def shape_of(context: Context, model: str) -> dict[str, Any]:
    return TINY_SHAPE if context.tiny else SHAPES[model]


def model_shape(context: Context, model: str) -> ModelShape:
    return ModelShape.from_config({"model_type": "llama"} | shape_of(context, model), model)


def sheet_rate(context: Context) -> float | None:
    """Returns the card's dense bf16 FLOP/s by its data sheet; None for a card that the plan does not know."""
    known = None if context.tiny else DEVICE_NAMES.get(torch.cuda.get_device_name())
    return GPUS[known].bf16 if known else None


def pairs_of(context: Context, lengths: str, *, count: int, model: str = "1.5B", seed: int = 0) -> list[dict[str, Any]]:
    """Returns random pairs with log-normal lengths of the means ``lengths``, each from 2 to half of ``longest``."""
    sizes, random = sizes_of(context), np.random.default_rng(seed)
    prompt, response = (int(mean) / sizes.shrink for mean in lengths.split("/"))
    vocabulary = shape_of(context, model)["vocab_size"]

    def ids(mean: float) -> list[int]:
        length = int(np.clip(random.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD), 2, sizes.longest // 2))
        return random.integers(3, vocabulary, length).tolist()

    return [
        {"prompt_ids": ids(prompt), "real_ids": ids(response), "generated_ids": ids(response)} for _ in range(count)
    ]


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    names = [f"{number:06d}" for number in range(len(rows))]
    columns = [[row[name] for row in rows] for name in ("prompt_ids", "real_ids", "generated_ids")]
    return pa.table([names, names, [0] * len(rows), *columns], schema=PAIR_SCHEMA)


def needed_of(shape: ModelShape, rows: list[dict[str, Any]], *, backward: bool) -> float:
    """Returns the FLOPs that trees of ``rows`` need, counted as the plan counts them."""
    tokens = targets = visible = 0.0
    for row in rows:
        prompt, real, generated = (len(row[name]) for name in ("prompt_ids", "real_ids", "generated_ids"))
        tokens += prompt + real + generated
        targets += real + generated
        visible += visible_pairs(prompt, (real, generated))
    return needed_flops(shape, tokens, targets, visible, backward=backward)


def model_folder(context: Context, model: str) -> Path:
    """Returns the folder of a random bf16 model, made once for all steps."""
    folder = context.work / f"model-{model}"
    if (folder / "done").exists():
        return folder
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**shape_of(context, model), max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device_of(context):
            made = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    made.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    ).save_pretrained(folder)  # fmt: skip
    (folder / "done").write_text(json.dumps(shape_of(context, model)))
    return folder
