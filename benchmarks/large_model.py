"""How much memory does each of two workers need to load, train and export a model of a billion parameters?

    python benchmarks/large_model.py [--layers 20] [--peak-gib 24] [--only "adapters, bf16"] [--system-malloc] [--write]

Only private memory is sampled, as the kernel can drop mapped files.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from tables import MEASURED_PAGE, put
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.runtime import cpu

PACK, STEPS = 128, 2
"""Tokens of a pack; optimizer steps: only the second shows the holes in memory that the first leaves."""
PHASES = ("load", "step", "export")
CASES: dict[str, tuple[str, bool | None]] = {
    "adapters": ("fp32", True), "adapters, bf16": ("bf16", False), "all weights": ("fp32", None),
}  # fmt: skip
"""Precision, and whether adapters are merged; None: no adapters."""
SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


def private_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


@contextmanager
def peak_of(found: dict[str, float], phase: str) -> Iterator[None]:
    """Notes the highest private memory during the phase, GiB."""
    done, peak = threading.Event(), [private_bytes()]

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    found[phase] = round(peak[0] / 2**30, 2)


def make_model(folder: str, layers: int) -> None:
    """Saves a random model; runs in its own process, so that its memory is freed."""
    torch.set_num_threads(2)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.ones(()) if parameter.ndim == 1 else torch.randn(parameter.shape) * 0.02)
    model.save_pretrained(folder, max_shard_size="500MB")


def one_rank(rank: int, folder: str, case: str) -> None:
    import numpy as np
    import pyarrow as pa

    from spin_ray.config.sections import LoraConfig, OptimizerConfig
    from spin_ray.learner.backends.base import BackendSettings
    from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
    from spin_ray.learner.packing import build_pack

    torch.set_num_threads(1)
    precision, merges = CASES[case]
    lora = None if merges is None else LoraConfig(merge=merges)
    store = dist.FileStore(f"{folder}/store-{case}", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    settings = BackendSettings(
        max_length=PACK, precision=precision, attention="packed", gradient_checkpointing=True,
        optimizer=OptimizerConfig(), learning_rate=1e-6, total_steps=STEPS, lora=lora,
    )  # fmt: skip
    found: dict[str, float] = {"before": round(private_bytes() / 2**30, 2)}
    with peak_of(found, "load"):
        backend = Fsdp2Backend(f"{folder}/model", settings, torch.device("cpu"))
    ids = np.random.default_rng(rank).integers(1, SHAPE["vocab_size"], (3, PACK // 3)).tolist()
    names = ("prompt_ids", "real_ids", "generated_ids")
    row = pa.table({name: pa.array([ids[i]], pa.list_(pa.int32())) for i, name in enumerate(names)})
    batch = build_pack(((0,),), row, pack_length=PACK, pad_id=0)
    started = time.monotonic()
    with peak_of(found, "step"):
        for _ in range(STEPS):
            backend.backward(-backend.logps(batch).sum() / 100, last_microbatch=True)
            backend.step()
    found["seconds of a step"] = round((time.monotonic() - started) / STEPS, 1)
    with peak_of(found, "export"):
        backend.export_hf(Path(f"{folder}/export-{case}"))
    found["parameters"] = sum(shard.numel() for shard in backend._shards.values())
    found["trained"] = sum(shard.numel() for shard in backend._shards.values() if shard.requires_grad)
    largest = backend._model.get_input_embeddings().weight.numel()
    found["frozen bytes"] = 2 if precision == "bf16" else 4
    found["largest"] = 2 * largest  # embeddings and head are one unit, gathered together
    Path(f"{folder}/{case}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def arithmetic(found: dict[str, Any]) -> float:
    """Returns the GiB that a rank needs in a step.

    A rank holds half of the frozen weights, and half of the trained fp32 weights with gradients and squares. The
    largest unit is whole, with its gradient if all weights are trained.
    """
    trains_all, each = found["trained"] == found["parameters"], found["frozen bytes"]
    shares = each * (found["parameters"] - found["trained"]) + 3 * 4 * found["trained"]
    return (shares / 2 + each * found["largest"] * (2 if trains_all else 1)) / 2**30


def run(function: Any, *arguments: Any, processes: int) -> None:
    context = torch.multiprocessing.spawn(function, args=arguments, nprocs=processes, join=False)
    assert context is not None
    while not context.join():
        pass


def _make(rank: int, folder: str, layers: int) -> None:
    make_model(f"{folder}/model", layers)


def main() -> None:
    cpu.prepare(threads=1)  # for the processes that are started here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20, help="20 make 1.0 billion parameters")
    parser.add_argument("--peak-gib", type=float, default=24, help="fail when both ranks together take more")
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured.md")
    parser.add_argument("--only", choices=[*CASES], help="measure one case, and write its own table")
    parser.add_argument("--system-malloc", action="store_true", help="in place of the train workers' allocator")
    options = parser.parse_args()
    lines = [
        "| trained | parameters | rank | loading | step | by arithmetic | export |",
        "|---|---|---|---|---|---|---|",
    ]
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run(_make, folder, options.layers, processes=1)
        if not options.system_malloc:
            os.environ.update(cpu.keep_freed_memory())  # read by the ranks when they start
        for case in [options.only] if options.only else CASES:
            run(one_rank, folder, case, processes=2)
            ranks = [json.loads(Path(f"{folder}/{case}-{rank}.json").read_text()) for rank in (0, 1)]
            shutil.rmtree(f"{folder}/export-{case}")
            lines += [line(rank, found, case) for rank, found in enumerate(ranks)]
            peaks[case] = sum(max(found[phase] for phase in PHASES) for found in ranks)
            print(lines[-2], lines[-1], f"step: {ranks[0]['seconds of a step']} s", sep="\n", flush=True)
    told = ", ".join(f"{peak:.1f} GiB ({case})" for case, peak in peaks.items())
    lines += ["", f"Both ranks at their peaks together, libraries included: {told}."]
    print("\n".join(lines))
    assert max(peaks.values()) < options.peak_gib
    if options.write:
        which = [f": {options.only}"] if options.only else []
        which += [", system's allocator"] if options.system_malloc else []
        put("".join(["memory of a large model", *which]), "\n".join(lines), MEASURED_PAGE)


def line(rank: int, found: dict[str, Any], case: str) -> str:
    what = case if CASES[case][1] is None else f"{case}, {found['trained'] / 1e6:.0f}M"
    load, step, export = (f"{found[phase] - found['before']:.1f}" for phase in PHASES)  # libraries were there before
    return (
        f"| {what} | {found['parameters'] / 1e9:.2f}B | {rank} | {load} | {step} | {arithmetic(found):.1f} | {export} |"
    )


if __name__ == "__main__":
    main()
