"""Two tiny preference models with random weights, in the layouts of the real ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaForSequenceClassification

from spin_ray.inputs.embedded import resolve


def save_reward_model(folder: Path, seed: int = 0) -> Path:
    """Saves a Llama with one output, and the tiny model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, initializer_range=0.5, pad_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pairrm(folder: Path, seed: int = 0) -> Path:
    """Saves a model with three tasks, its weights and config.json named as in llm-blender/PairRM-hf."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    tokenizer.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>"])
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, pad_token_id=0, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    weights = {f"pretrained_model.{name}": value for name, value in DebertaV2Model(config).state_dict().items()}
    for number, layer in {"1": nn.Linear(32, 16), "4": nn.Linear(16, 3)}.items():
        weights |= {f"head_layer.{number}.{name}": value for name, value in layer.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    source, first, second = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("source", "candidate1", "candidate2")
    )
    more = {
        "n_tasks": 3,
        "drop_out": 0.05,
        "source_prefix_id": source,
        "cand1_prefix_id": first,
        "cand2_prefix_id": second,
    }
    (folder / "config.json").write_text(json.dumps(config.to_dict() | more))
    return folder
