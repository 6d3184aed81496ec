"""Do train workers send as many bytes as ``spin-ray plan`` predicts?

    python benchmarks/traffic_check.py [--ranks 2 4] [--model 45m]     # one JSON line for each case
    python benchmarks/traffic_check.py --times --model 45m             # five meshes, in turn, --rounds 5

    ratio             counted / predicted bytes of a rank in a step
    slower            seconds of a step / one rank's with as many packs in the same round: median, least and most
    slower_predicted  the plan's, where ranks share this machine's cores; the links are assumed
    load              this machine's, which should come from the ranks alone

Scalars (norms, metrics) are not counted.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.plan_check import RANDOM_SIZES
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.packing import build_pack
from spin_ray.planning.groups import Ranks
from spin_ray.planning.hardware import CPU
from spin_ray.planning.learner_cost import pack_flops
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.traffic import step_collectives, step_time
from spin_ray.run_dir.schemas import TOKEN_IDS

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64},
    "45m": RANDOM_SIZES["45m"],
}  # fmt: skip
"""Every dimension is a multiple of 4, so that FSDP2 pads nothing on 4 ranks."""
PACKS, TREE = 2, (16, 24, 24)
"""Packs of a rank in a step; tokens of prompt, y and y' of a pack's one tree."""
SCALARS = 64
"""Largest collective, in bytes, that does not belong to the model."""


@dataclass(frozen=True)
class Case:
    mesh: Mesh
    sharding: str = "full"
    every_pack: bool = False
    checkpointing: bool = False
    rank_of_lora: int = 0
    precision: str = "fp32"

    @property
    def ranks(self) -> int:
        return self.mesh.ranks

    def config(self, model: str) -> SpinConfig:
        return SpinConfig.model_validate(
            {
                "model": {"path": model, "max_length": sum(TREE[:2])},
                "data": {"train": "-"},
                "generation": {"sampling": {"max_tokens": TREE[2]}},
                "train": {
                    "workers": self.ranks, "mesh": self.mesh.model_dump(), "pack_length": sum(TREE),
                    "sharding": self.sharding,
                    "precision": self.precision, "reduce_every_pack": self.every_pack,
                    "gradient_checkpointing": self.checkpointing,
                    "lora": {"rank": self.rank_of_lora} if self.rank_of_lora else None,
                },
            }
        )  # fmt: skip


CASES = (
    Case(Mesh(shard=2)), Case(Mesh(shard=2), every_pack=True), Case(Mesh(shard=2), sharding="shard_grad_op"),
    Case(Mesh(shard=2), checkpointing=True), Case(Mesh(shard=2), rank_of_lora=4),
    Case(Mesh(shard=2), precision="bf16", every_pack=True), Case(Mesh(replicate=2)),
    Case(Mesh(shard=4), every_pack=True), Case(Mesh(replicate=2, shard=2), every_pack=True),
    Case(Mesh(replicate=2, shard=2)), Case(Mesh(shard=2, tensor=2), every_pack=True),
)  # fmt: skip


TIMED = (
    Case(Mesh(shard=2)), Case(Mesh(replicate=2)), Case(Mesh(shard=4), every_pack=True),
    Case(Mesh(replicate=2, shard=2)),
)  # fmt: skip


class SentBytes(TorchDispatchMode):
    """A counter of the bytes that this rank sends in a ring, the least that any algorithm can send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self._add("weights", _bytes(args[0]) - _bytes(args[1]))
        elif name == "c10d::_reduce_scatter_base_":
            self._add("gradients", _bytes(args[1]) - _bytes(args[0]))
        elif name == "c10d::allreduce_":
            whole, size = sum(map(_bytes, args[0])), dist.ProcessGroup.unbox(args[1]).size()
            self._add("replicas", 2 * whole * (size - 1) // size)
        elif name == "_c10d_functional::all_reduce":
            size = dist.distributed_c10d._resolve_process_group(args[2]).size()
            self._add("activations", 2 * _bytes(args[0]) * (size - 1) // size)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, count: int) -> None:
        if count > SCALARS:
            self.sent[name] += count


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def predicted(case: Case, model: Path, *, backward: bool = True) -> dict[str, float]:
    shape = ModelShape.from_folder(model)
    config = case.config(str(model))
    found: Counter[str] = Counter()
    for it in step_collectives(
        config, shape, Ranks(mesh=case.mesh, per_node=case.ranks), PACKS, sum(TREE), backward=backward
    ):
        found[it.name] += it.sent
    return dict(found)


def predicted_seconds(case: Case, model: Path) -> float:
    """Returns the plan's seconds of a step, with one core a rank, or a share if this machine has fewer cores."""
    shape = ModelShape.from_folder(model)
    config, split = case.config(str(model)), shape.split(case.mesh.tensor)
    ranks = Ranks(mesh=case.mesh, per_node=case.ranks)
    each = min(1.0, (os.cpu_count() or 1) / case.ranks)
    length, targets, rate = sum(TREE), sum(TREE[1:]), each * CPU.fp32 * CPU.efficiency
    forward, whole = (
        PACKS * pack_flops(config, split, length, targets, length**2, backward=both) / rate for both in (False, True)
    )
    sent = step_collectives(config, shape, ranks, PACKS, sum(TREE), backward=True)
    return step_time(sent, CPU, {"forward": forward, "backward": whole - forward}).seconds


def save_model(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODELS[name], tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def measure(cases: list[Case], model: Path, folder: Path, steps: int = 1) -> list[list[dict[str, Any]]]:
    """Returns, for each case and rank, the bytes of a training and a scoring step, and a step's median seconds."""
    for ranks in sorted({case.ranks for case in cases}):
        mine = [(number, case) for number, case in enumerate(cases) if case.ranks == ranks]
        # The server imports once what every rank needs.
        multiprocessing.set_forkserver_preload(["spin_ray.learner.backends.fsdp2"])
        torch.multiprocessing.start_processes(
            _rank, args=(mine, ranks, model, folder, steps), nprocs=ranks, start_method="forkserver"
        )
    return [
        [json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(case.ranks)]
        for number, case in enumerate(cases)
    ]


def _rank(rank: int, cases: list[tuple[int, Case]], ranks: int, model: Path, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    for number, case in cases:
        (folder / f"{number}-{rank}.json").write_text(json.dumps(_count(case, model, steps)))
    dist.destroy_process_group()


def _count(case: Case, model: Path, steps: int) -> dict[str, Any]:
    config = case.config(str(model))
    settings = BackendSettings(
        max_length=config.model.max_length, precision=config.train.precision, lora=config.train.lora,
        mesh=case.mesh, gradient_checkpointing=case.checkpointing, sharding=config.train.sharding,
        reduce_every_pack=case.every_pack,
        optimizer=config.train.optimizer, learning_rate=1e-6, total_steps=steps + 1,
    )  # fmt: skip
    backend = Fsdp2Backend(model, settings, torch.device("cpu"))
    rng = np.random.default_rng(0)
    columns = zip(("prompt_ids", "real_ids", "generated_ids"), TREE, strict=True)
    table = pa.table({name: pa.array([rng.integers(3, 60, size).tolist()], TOKEN_IDS) for name, size in columns})
    batch = build_pack(((0,),), table, pack_length=sum(TREE), pad_id=0)

    def train() -> None:
        for number in range(PACKS):
            backend.backward(-backend.logps(batch).sum(), last_microbatch=number == PACKS - 1)
        backend.step()

    train()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        train()
        seconds.append(time.perf_counter() - started)
    with SentBytes() as training:
        train()
    backend.score(batch)
    with SentBytes() as scoring:
        for _ in range(PACKS):
            backend.score(batch)
    return {"training": training.sent, "scoring": scoring.sent, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--times", action="store_true", help="meshes without other settings, in rounds")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    listed, rounds = (TIMED, options.rounds) if options.times else (CASES, 1)
    cases = [Case(Mesh()), *(case for case in listed if case.ranks in options.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(options.model, Path(folder) / "model")
        measured = []
        for number in range(rounds):
            (place := Path(folder) / str(number)).mkdir()
            measured.append(measure(cases, model, place, options.steps))
        for number, case in enumerate(cases):
            expected = predicted(case, model)
            counted = measured[0][number][0]["training"]
            slower = sorted(one[number][0]["seconds"] / one[0][0]["seconds"] for one in measured)
            print(json.dumps({
                **vars(case), "mesh": str(case.mesh), "counted": counted, "predicted": expected,
                "ratio": sum(counted.values()) / sum(expected.values()) if expected else None,
                "slower": [round(it, 2) for it in (statistics.median(slower), slower[0], slower[-1])],
                "slower_predicted": round(predicted_seconds(case, model) / predicted_seconds(cases[0], model), 2),
                "load": round(os.getloadavg()[0], 1),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
