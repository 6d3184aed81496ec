"""One iterate, measured on held-out rows: greedy and sampled answers, log p(y), lengths, distinct n-grams.

    python benchmarks/quality/measure.py --run RUN --model FOLDER --out FILE.json

A process of its own, as vLLM and torch should not share one. Per-row results are kept: intervals are paired by row.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin_ray import cpu
from spin_ray.answers import is_correct
from spin_ray.config import SamplingConfig, SpinConfig
from spin_ray.engine import EngineSpec, VllmEngine
from spin_ray.rendering import ChatRenderer, load_tokenizer
from spin_ray.run_dir import RunDir
from spin_ray.stages.generation import row_seed
from spin_ray.storage import Storage

SAMPLES = 4
SEED = 20240102
"""Of the samples that are measured: the same for every arm and seed, so that differences are the models'."""


def measure(run: RunDir, config: SpinConfig, model: Path) -> dict[str, Any]:
    heldout = pa.concat_tables(list(run.heldout.tables()))
    tokenizer = load_tokenizer(str(model))
    greedy, sampled = _answers(heldout, config, model, ChatRenderer(tokenizer).end_of_turn_id)
    answers, extractor = heldout["answer"].to_pylist(), config.evaluation.answer_extractor

    def correct(responses: list[list[int]]) -> list[bool]:
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [is_correct(text, answer, extractor) for text, answer in zip(texts, answers, strict=True)]

    everything = [response for sample in sampled for response in sample]
    return {
        "prompt_ids": heldout["prompt_id"].to_pylist(),
        "greedy": correct(greedy),
        "sampled": [list(each) for each in zip(*map(correct, sampled), strict=True)],
        "real_logp": _real_logps(heldout, config, model),
        "real_tokens": [len(ids) for ids in heldout["real_ids"].to_pylist()],
        "generated_length": sum(map(len, everything)) / len(everything),
        "distinct_1": distinct(everything, 1),
        "distinct_2": distinct(everything, 2),
    }


def distinct(responses: list[list[int]], n: int) -> float:
    """Different n-grams of tokens per n-gram, over all responses."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _answers(
    heldout: pa.Table, config: SpinConfig, model: Path, stop: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Greedy responses, and four samples at temperature 1 (by sample, then row)."""
    spec = EngineSpec(
        model=model, max_length=config.model.max_length, stop_token_id=stop,
        threads=config.generation.resources.threads, config=config.generation.engine,
    )  # fmt: skip
    engine = VllmEngine(spec)
    prompts, ids = heldout["prompt_ids"].to_pylist(), heldout["prompt_id"].to_pylist()
    longest = config.generation.sampling.max_tokens

    def play(temperature: float, sample: int) -> list[list[int]]:
        seeds = [row_seed(SEED, "measure", prompt_id, sample) for prompt_id in ids]
        sampling = SamplingConfig(temperature=temperature, max_tokens=longest)
        return [completion.token_ids for completion in engine.generate(prompts, sampling, seeds)]

    found = play(0.0, 0), [play(1.0, sample) for sample in range(SAMPLES)]
    engine.close()
    return found


def _real_logps(heldout: pa.Table, config: SpinConfig, model: Path) -> list[float]:
    """log p(y|x) of people's responses in fp32, in nats, in the order of the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from spin_ray.learner.loop import PackShape, plan
    from spin_ray.learner.losses import pair_logps
    from spin_ray.learner.scoring import ResponseScorer
    from spin_ray.types import PAIR_SCHEMA

    torch.set_num_threads(config.generation.resources.threads)
    count = heldout.num_rows
    columns = [heldout["prompt_id"], heldout["prompt_id"], pa.array([0] * count, pa.int32()), heldout["prompt_ids"]]
    empty = pa.array([[]] * count, PAIR_SCHEMA.field("generated_ids").type)
    table = pa.table([*columns, heldout["real_ids"], empty], schema=PAIR_SCHEMA)
    shape = PackShape(pack_length=config.train.pack_length, global_batch_pairs=count, pad_id=0)
    scorer = ResponseScorer(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    logps = [0.0] * count
    with torch.no_grad():
        for step in plan(table, shape, epochs=1, seed=0)[0]:
            for pack in step.packs:
                batch = shape.build(pack, table)
                real, _ = pair_logps(scorer(batch), batch)
                for row, logp in zip(batch.pair_row.tolist(), real.tolist(), strict=True):
                    logps[row] = logp
    return logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    run = RunDir(Storage(options.run))
    config = run.config()
    cpu.prepare(config.generation.resources.threads)
    found = measure(run, config, options.model)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
