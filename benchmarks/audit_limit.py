"""Which ``health.max_engine_difference`` separates rounding from a model that is read wrongly?

Compares log p of sampled answers with that of the model rounded, or loaded with other settings.

    python benchmarks/audit_limit.py [--write]
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import torch
from harness import MODEL
from tables import ROOT, put
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from where import machine

from spin_ray.inputs.check import versions
from spin_ray.inputs.embedded import resolve

QUESTIONS = (
    "Tell me about your day.", "What is a good name for a cat?", "Explain rain to a child.", "2 + 2?",
    "Write a line about the sea.", "Why do people laugh?", "Name three fruits.", "How do I boil an egg?",
)  # fmt: skip
LENGTH = 48
PAGE = ROOT / "docs" / "faults.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    answers = list(answered(load()))
    tokens = sum(len(row) - start for row, start in answers)
    own = logps(load(), answers)
    lines = ["| the same folder | nats a token |", "|---|---|"]
    for name, model in others():
        apart = sum(abs(a - b) for a, b in zip(logps(model, answers), own, strict=True)) / tokens
        lines.append(f"| {name} | {apart:.3f} |")
        print(lines[-1], flush=True)
    if options.write:
        made = f"SmolLM2-135M, {len(answers)} answers of {tokens} tokens, transformers {versions()['transformers']}"
        put("audit limit", "\n".join([*lines, "", f"{made}, {machine()}, {date.today().isoformat()}."]), PAGE)


def load(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = AutoConfig.from_pretrained(resolve(MODEL))
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_pretrained(resolve(MODEL), config=config, dtype=dtype).eval()


def answered(model: Any) -> Iterator[tuple[Tensor, int]]:
    """Yields token ids of prompt and answer, and the index where the answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    for question in QUESTIONS * 2:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        (row,) = model.generate(**asked, max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0)
        yield row, asked["input_ids"].shape[1]


@torch.no_grad()
def logps(model: Any, answers: list[tuple[Tensor, int]]) -> list[float]:
    found = []
    for row, start in answers:
        each = model(row[None]).logits[0, start - 1 : -1].float().log_softmax(-1)
        found.append(float(each.gather(-1, row[start:, None]).sum()))
    return found


def others() -> Iterator[tuple[str, Any]]:
    yield "rounded to bf16", load(torch.bfloat16)
    yield "weights of 8 bits, a scale for 64", rounded(load(), lambda weight: blocks_of(weight, bits=8))
    yield "weights of fp8 (e4m3), a scale for each matrix", rounded(load(), fp8)
    base = load().config.rope_parameters["rope_theta"]
    yield "rotary base doubled", load(rope_parameters={"rope_type": "default", "rope_theta": 2 * base})
    for factor, whose in ((1.139, "YaRN by 4"), (1.277, "YaRN by 16, as Ministral 3")):
        rope = {"rope_type": "yarn", "rope_theta": base, "factor": 1.0, "original_max_position_embeddings": 8192}
        yield f"attention factor {factor} ({whose})", load(rope_parameters=rope | {"attention_factor": factor})


def rounded(model: Any, rounding: Callable[[Tensor], Tensor]) -> Any:
    """Rounds every matrix except the embeddings, which are also the head."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data = rounding(parameter.data)
    return model


def blocks_of(weight: Tensor, bits: int) -> Tensor:
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / scale).round() * scale).reshape(weight.shape)


def fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


if __name__ == "__main__":
    main()
