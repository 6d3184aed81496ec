"""Does ``spin-ray plan`` predict the time and memory of scoring and training?

    python benchmarks/plan_check.py [--threads 2] [--packs 5] [--pack-length 512] [--models 45m 135m 362m]

Prints the rate of a plain fp32 product, with which ``hardware.CPU`` can be corrected, and one JSON line for each model
and kind of pack:

- ``ratio``: predicted / measured seconds, with ``hardware.CPU``'s rate of a core: nothing is calibrated;
- ``ratio_calibrated``: the same with the measured rate of 135m's training packs, whose own ratio is 1;
- ``memory_ratio``: predicted / measured peak of resident memory beyond that before loading the model.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.planning.hardware import CPU
from spin_ray.planning.learner_cost import learner_memory, pack_flops
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import RUNTIME
from spin_ray.planning.work import Packs
from spin_ray.runtime import cpu

CALIBRATED_ON = ("135m", "training")
RANDOM_SIZES: dict[str, dict[str, int]] = {
    "45m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 49152},
    "362m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "vocab_size": 49152},
}  # fmt: skip
"""Random Llamas; 362m has the shape of SmolLM2-360M."""
TREE = (96, 64, 64)
"""Tokens of prompt, y and y' of every tree."""


@dataclass(frozen=True)
class Case:
    model: str
    kind: str
    """``scoring``, ``training`` or ``checkpointed`` (with gradient checkpointing)."""

    def config(self, options: argparse.Namespace) -> SpinConfig:
        train = {"pack_length": options.pack_length, "precision": "fp32"}
        return SpinConfig.model_validate(
            {
                "model": {"path": self.model, "max_length": TREE[0] + TREE[1]},
                "data": {"train": "-"},
                "generation": {"sampling": {"max_tokens": TREE[2]}},
                "train": train | {"gradient_checkpointing": self.kind == "checkpointed"},
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--packs", type=int, default=5)
    parser.add_argument("--pack-length", type=int, default=512)
    parser.add_argument("--models", nargs="+", default=["45m", "135m", "362m"], choices=["45m", "135m", "362m"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu.prepare(options.threads)
    if options.one:
        print(json.dumps(measure(Case(*options.one), options)))
        return
    print(json.dumps({"fp32_product_gflops": round(product_rate(options.threads) / 1e9, 1)}), flush=True)
    cases = [Case(model, kind) for model in options.models for kind in ("scoring", "training", "checkpointed")]
    found = {(case.model, case.kind): in_own_process(case) for case in cases}
    calibration = found.get(CALIBRATED_ON)
    rate = calibration["flops"] / calibration["seconds"] if calibration else None
    for (model, kind), line in found.items():
        line = {"model": model, "kind": kind} | line
        line["reached_gflops"] = round(line["flops"] / line["seconds"] / 1e9, 1)
        if rate:
            line["ratio_calibrated"] = round(line["flops"] / rate / line["seconds"], 3)
        print(json.dumps(line), flush=True)


def in_own_process(case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", case.model, case.kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the median seconds of a pack after one warm-up, beside the cost model's values."""
    config = case.config(options)
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(case.model, Path(folder) / "model")
        shape = ModelShape.from_folder(model)
        importlib.import_module("spin_ray.learner.backends.fsdp2")  # torch itself is not the model's memory
        before = peak_bytes()
        seconds, targets = time_packs(model, config, options, Path(folder), backward=case.kind != "scoring")
        used = peak_bytes() - before
    backward = case.kind != "scoring"
    attended = options.pack_length // sum(TREE) * sum(TREE) ** 2  # on CPUs each tree by itself
    flops = pack_flops(config, shape, config.train.pack_length, targets, attended, backward=backward)
    predicted = CPU.share(ResourcesConfig(cpus=options.threads)).seconds(flops, config.train.precision)
    packs = Packs(
        steps=1, per_step=2, per_rank=2, length=config.train.pack_length, targets=targets, per_rank_at_most=2, tokens=0
    )
    memory = learner_memory(config, shape, packs, optimizer=config.train.optimizer, backward=backward)
    return {
        "parameters": shape.parameters,
        "flops": flops,
        "seconds": round(seconds, 3),
        "ratio": round(predicted / seconds, 3),
        "memory_gb": round(used / 1e9, 2),
        "memory_ratio": round((sum(memory.values()) - RUNTIME) / used, 3),
    }


def model_folder(name: str, folder: Path) -> Path:
    if name == "135m":
        from spin_ray.inputs.embedded import resolve

        return Path(resolve("embedded:smollm2-135m-instruct"))
    # In a process of its own, so that making it is not in the measured peak of memory.
    code = (
        "import sys, json, torch; from transformers import LlamaConfig, LlamaForCausalLM; torch.manual_seed(0); "
        "config = LlamaConfig(**json.loads(sys.argv[1]), tie_word_embeddings=True); "
        "LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(RANDOM_SIZES[name]), str(folder)], check=True)
    return folder


def time_packs(
    model: Path, config: SpinConfig, options: argparse.Namespace, folder: Path, *, backward: bool
) -> tuple[float, int]:
    """Returns the median seconds of a pack, and its response tokens."""
    import numpy as np
    import pyarrow as pa
    import torch
    import torch.distributed as dist

    from spin_ray.learner.backends.base import BackendSettings
    from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
    from spin_ray.learner.packing import build_pack
    from spin_ray.run_dir.schemas import TOKEN_IDS

    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    settings = BackendSettings(
        max_length=config.model.max_length,
        precision=config.train.precision,
        gradient_checkpointing=config.train.gradient_checkpointing is True,
        optimizer=config.train.optimizer,
        learning_rate=1e-7,
        total_steps=1,
    )
    backend = Fsdp2Backend(model, settings, torch.device("cpu"))
    rng = np.random.default_rng(0)
    trees = options.pack_length // sum(TREE)
    columns = zip(("prompt_ids", "real_ids", "generated_ids"), TREE, strict=True)
    table = pa.table(
        {
            name: pa.array([rng.integers(3, 300, size).tolist() for _ in range(trees)], TOKEN_IDS)
            for name, size in columns
        }
    )
    pack = tuple((row,) for row in range(trees))
    batch = build_pack(pack, table, pack_length=options.pack_length, pad_id=0)
    seconds = []
    for _ in range(options.packs + 1):
        started = time.perf_counter()
        if backward:
            backend.backward(-backend.logps(batch).sum() / len(batch.target_ids), last_microbatch=False)
        else:
            backend.score(batch)
        seconds.append(time.perf_counter() - started)
    if backward:  # the reduction and the step belong to the memory, not to the time of a pack
        backend.backward(-backend.logps(batch).sum() / len(batch.target_ids), last_microbatch=True)
        backend.step()
    dist.destroy_process_group()
    return statistics.median(seconds[1:]), len(batch.target_ids)


def product_rate(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    size = 2048
    left, right = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
