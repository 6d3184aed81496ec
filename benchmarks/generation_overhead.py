"""How much of the engine's own speed does the generation stage keep?

    python benchmarks/generation_overhead.py [--rows 1000] [--max-tokens 32] [--pairs 5]

The stage's actor code and ``VllmEngine.generate`` alone use the same warm engine, in turns. What ``VllmEngine`` adds to
vLLM's ``LLM.generate`` is in both.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from harness import at_least, record

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import check_recipe
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.generation.shards import cut_into_shards
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.connect import connect
from spin_ray.runtime.engine import EngineSpec, VllmEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    config = SpinConfig.model_validate(
        {
            "model": {"path": resolve("embedded:smollm2-135m-instruct"), "max_length": 192},
            "data": {"train": resolve("embedded:chitchat-train"), "system": "", "max_rows": options.rows},
            "generation": {
                "shard_rows": options.rows, "sampling": {"max_tokens": options.max_tokens}, "resources": {"cpus": 2},
                "engine": {"enforce_eager": True, "max_num_seqs": 96},
            },
            "train": {"pack_length": 512},
        }
    )  # fmt: skip
    start = check_recipe(config)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Storage(folder))
        connect(config)
        prompts.run(run, config, config.model.path, prompts.RowsOf.training(run, config, start.train))
        engine = VllmEngine(
            EngineSpec(
                model=Path(config.model.path), max_length=192, stop_token_id=start.end_of_turn_id, threads=2,
                config=config.generation.engine,
            )
        )  # fmt: skip
        ratios = []
        for number in range(-1, options.pairs):  # the first pair warms up
            target = run.artefact(f"bench_{number}/generations")
            alone_s, stage_s, tokens = compare(run.prompts, target, config, engine)
            if number >= 0:
                ratios.append(alone_s / stage_s)
                print(json.dumps({"alone_s": round(alone_s, 2), "stage_s": round(stage_s, 2), "tokens": tokens}))
    note = f"{options.rows} prompts, {options.max_tokens} tokens each at most"
    record([at_least("5 generation stage, share of VllmEngine.generate alone", ratios, 0.95, note)])


def compare(source: Artefact, target: Artefact, config: SpinConfig, engine: VllmEngine) -> tuple[float, float, int]:
    """Returns seconds of the engine alone, seconds of the stage, and the number of tokens."""
    shards = cut_into_shards(
        generation.Job(source, target, ModelFolder(Path(config.model.path), "-", "sft", 0)), config
    )
    rows = [row for table in source.tables() for row in table.to_pylist()]
    seeds = [generation.row_seed(config.seed, "sft", row["prompt_id"], 0) for row in rows]
    started = time.perf_counter()
    alone = engine.generate([row["prompt_ids"] for row in rows], config.generation.sampling, seeds)
    alone_s = time.perf_counter() - started
    started = time.perf_counter()
    tables = [generation.answer(shard, config, engine) for shard in shards]
    for shard, table in zip(shards, tables, strict=True):
        target.write_part(shard.name, table)
    stage_s = time.perf_counter() - started
    answers = [ids for table in tables for ids in table["token_ids"].to_pylist()]
    assert answers == [completion.token_ids for completion in alone], "both sides must do the same work"
    return alone_s, stage_s, sum(map(len, answers))


if __name__ == "__main__":
    main()
