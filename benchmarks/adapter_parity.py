"""Does an engine with an adapter answer as an engine with the merged model does?

Compares both with transformers and PEFT's unmerged adapter, which is random, of rank 4.

    python benchmarks/adapter_parity.py [--model embedded:tiny-llama] [--write]
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS

from spin_ray.config.sections import EngineConfig, SamplingConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.learner.adapter_folder import merge
from spin_ray.runtime import cpu
from spin_ray.runtime.engine import EngineSpec, VllmEngine

PROMPTS, LENGTH, TOKENS = 16, 12, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    cpu.prepare(threads=1)  # for the processes that are started here
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:tiny-llama")
    parser.add_argument("--write", action="store_true", help="write results/adapter_parity.md")
    options = parser.parse_args()
    base = Path(resolve(options.model))
    lines = [
        "| format | greedy tokens alike, vLLM with adapter and PEFT | the same, vLLM with merged model "
        "| log p of a token, merged − unmerged: largest | mean |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(name) / "adapter"
        alone(make_adapter, base, adapter)
        for dtype in DTYPES:
            merged = Path(name) / f"merged-{dtype}"
            alone(merge_into, base, adapter, merged, dtype)
            expected, largest, mean = alone(by_transformers, base, adapter, merged, dtype)
            found = [
                alike(alone(by_vllm, folder, with_adapter, dtype), expected)
                for folder, with_adapter in ((base, adapter), (merged, None))
            ]
            lines.append(f"| {dtype} | {found[0]} | {found[1]} | {largest:.1e} | {mean:.1e} |")
    text = "\n".join(lines)
    print(text)
    if options.write:
        command = f"`python benchmarks/adapter_parity.py --model {options.model} --write`"
        title = f"# Adapters on an engine beside merged models\n\nBy {command}."
        bound = (
            f"{PROMPTS} prompts of {LENGTH} tokens, {TOKENS} greedy tokens each; `{options.model}`, adapter of rank 4. "
            "A prompt's tokens count as alike up to the first that differs."
        )
        (RESULTS / "adapter_parity.md").write_text(f"{title}\n\n{bound}\n\n{text}\n")


def alone(function: Any, *arguments: Any) -> Any:
    """Calls a function in its own process, as engines give no memory back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def prompts(base: Path) -> list[list[int]]:
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    return torch.randint(3, vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def make_adapter(base: Path, target: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    random = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=random)
    adapted.save_pretrained(target)


def merge_into(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    merge(base, adapter, target, dtype=DTYPES[dtype], trust_remote_code=False)


@torch.no_grad()
def by_transformers(base: Path, adapter: Path, merged: Path, dtype: str) -> tuple[list[list[int]], float, float]:
    """Returns PEFT's greedy tokens, and how far the merged model's log p of them differs: largest, mean."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    load = AutoModelForCausalLM.from_pretrained
    unmerged = peft.PeftModel.from_pretrained(load(base, dtype=DTYPES[dtype]), adapter).to(DTYPES[dtype]).eval()
    ids = torch.tensor(prompts(base))
    for _ in range(TOKENS):
        ids = torch.cat([ids, unmerged(ids).logits[:, -1:].argmax(-1)], 1)
    first, second = (
        model(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])
        for model in (unmerged, load(merged, dtype=DTYPES[dtype]))
    )
    difference = (first - second)[:, LENGTH - 1 :].abs()
    return ids[:, LENGTH:].tolist(), difference.max().item(), difference.mean().item()


def by_vllm(folder: Path, adapter: Path | None, dtype: str) -> list[list[int]]:
    config = EngineConfig(dtype=dtype, enforce_eager=True, cpu_kv_cache_gib=1, max_num_seqs=PROMPTS)
    engine = VllmEngine(
        EngineSpec(
            model=folder,
            max_length=LENGTH + TOKENS,
            stop_token_id=0,
            threads=1,
            config=config,
            adapter=adapter,
            adapter_rank=4 if adapter else None,
        )
    )
    asked = prompts(folder)
    answers = engine.generate(asked, SamplingConfig(temperature=0, max_tokens=TOKENS), [0] * PROMPTS)
    return [answer.token_ids for answer in answers]


def alike(found: list[list[int]], expected: list[list[int]]) -> str:
    same = 0
    for ours, theirs in zip(found, expected, strict=True):
        length = min(len(ours), len(theirs))
        same += next((at for at in range(length) if ours[at] != theirs[at]), length)
    whole = sum(min(len(ours), len(theirs)) for ours, theirs in zip(found, expected, strict=True))
    return f"{same} of {whole}"


if __name__ == "__main__":
    main()
