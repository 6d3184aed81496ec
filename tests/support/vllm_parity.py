"""Audits vLLM's log-probabilities of iteration 1's opponent; test_smollm2_run runs it as a module.

A response's sum must agree with the trainer's in reference/ within 0.05 nats per token on average and 0.15 at worst, as
the trainer may have computed in bf16. A generation_config.json must not change samples.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from spin_ray.config.sections import EngineConfig, SamplingConfig
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.engine import EngineSpec, VllmEngine

ENGINE = EngineConfig(dtype="float32", enforce_eager=True, cpu_kv_cache_gib=1, max_num_seqs=8)


def start(model: Path) -> VllmEngine:
    return VllmEngine(EngineSpec(model=model, max_length=192, stop_token_id=2, threads=2, config=ENGINE))


def audit(run: RunDir, engine: VllmEngine) -> None:
    from vllm import SamplingParams, TokensPrompt

    pairs = {row["pair_id"]: row for table in run.pairs(1).tables() for row in table.to_pylist()}
    gaps = {}
    for score in [row for table in run.reference(1).tables() for row in table.to_pylist()]:
        pair = pairs[score["pair_id"]]
        ids, begin = pair["prompt_ids"] + pair["generated_ids"], len(pair["prompt_ids"])
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = engine._llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)[0]
        logp = sum(output.prompt_logprobs[place][ids[place]].logprob for place in range(begin, len(ids)))
        gaps[score["pair_id"]] = abs(logp - score["generated_logp"]) / len(pair["generated_ids"])
    assert sum(gaps.values()) / len(gaps) <= 0.05, gaps
    assert max(gaps.values()) <= 0.15, gaps
    print(f"nats per token: mean {sum(gaps.values()) / len(gaps):.4f}, worst {max(gaps.values()):.4f}")


def main() -> None:
    run = RunDir(Storage(sys.argv[1]))
    prompts = [row["prompt_ids"] for table in run.heldout.tables() for row in table.to_pylist()]
    sampling = SamplingConfig(max_tokens=8)
    engine = start(run.storage.path("iter_000/model"))
    audit(run, engine)
    answers = engine.generate(prompts, sampling, range(len(prompts)))
    engine.close()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(run.storage.path("iter_000/model"), copy)
        (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.01, "top_k": 1, "eos_token_id": 2}))
        engine = start(copy)
        assert engine.generate(prompts, sampling, range(len(prompts))) == answers
        engine.close()


if __name__ == "__main__":
    main()
