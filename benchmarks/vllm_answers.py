"""vLLM's greedy answers in fp32, with their log-probabilities. Importing this module imports vLLM."""

import json
import os
import sys
from pathlib import Path

from spin_ray.config.sections import EngineConfig
from spin_ray.runtime.engine import prepare_process

prepare_process(EngineConfig(cpu_kv_cache_gib=1), threads=1)
from vllm import LLM, SamplingParams  # noqa: E402 (its environment comes first)

from spin_ray.runtime.corrections import corrections  # noqa: E402


def write(folder: Path, prompts: list[list[int]], length: int) -> None:
    """Writes ``answers.json`` beside the model's ``folder``, and all output of this process to ``log`` there."""
    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    engine = LLM(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64,
        generation_config="vllm", seed=0, enable_prefix_caching=False, **corrections(folder, {}, on_cpu=True),
    )  # fmt: skip
    how = SamplingParams(temperature=0, max_tokens=length, logprobs=0, detokenize=False, ignore_eos=True)
    answers = [it.outputs[0] for it in engine.generate([{"prompt_token_ids": ids} for ids in prompts], how)]
    told = [
        {
            "ids": list(answer.token_ids),
            "logps": [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)],
        }
        for answer in answers
    ]
    (folder.parent / "answers.json").write_text(json.dumps(told))
