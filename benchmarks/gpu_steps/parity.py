"""Step 4: is it right? Packs against transformers, step 0, steps beside a CPU's, resume, export, NCCL."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_steps.child import Context, Item, environment
from gpu_steps.learner import BEST, Learner, as_variant, group_of, one_rank
from gpu_steps.rows import Measure
from gpu_steps.sizes import CHAT, SHORT, device_of, model_folder, pairs_of
from spin_ray.runtime import gpu

MODEL = "0.1B"
RATE = 1e-4
"""Learning rate, large enough that a difference would show."""


def packed(precision: str, context: Context) -> Iterator[Measure]:
    """Yields the largest difference between packed scores and transformers' scores.

    In fp32 responses are short: fp32 keeps a sum of 2,048 nats to 2.4e-4.
    """
    learner = make(context, precision, lengths=SHORT if precision == "fp32" else CHAT)
    scores = learner.score()
    found = torch.stack([scores.real, scores.generated], dim=1).double().cpu()
    expected = one_by_one(context, model_folder(context, MODEL), learner.rows, precision)
    lengths = torch.tensor([[len(row["real_ids"]), len(row["generated_ids"])] for row in learner.rows])
    differences = (found - expected).abs()
    if precision == "fp32":
        yield Measure(
            id="fp32, packed against one by one", value=float(differences.max()), unit="nats a response, largest",
            target="<= 1e-4", note=SHORT,
        )  # fmt: skip
    else:
        per_token = float((differences / lengths).max())
        yield Measure(
            id="bf16, packed against one by one", value=per_token, unit="nats a token, largest", target="<= 0.05"
        )


def step_zero(context: Context) -> Iterator[Measure]:
    """Yields margin and loss less ln 2 of step 0; margins are 0 if scoring and training compute the same bits."""
    learner = make(context, "bf16")
    learner.score()
    metrics = learner.step()
    yield Measure(id="step 0, |margin|", value=abs(metrics["margin"]), unit="nats, times beta", target="<= 0")
    yield Measure(id="step 0, loss - ln 2", value=metrics["loss"] - 0.6931471805599453, unit="nats")


def steps_beside_cpu(context: Context) -> Iterator[Measure]:
    times = 3 if context.tiny else 20
    histories = []
    for device in (device_of(context), torch.device("cpu")):
        with one_rank("gloo" if device.type == "cpu" else group_of(context)):
            learner = make(context, "fp32", device=device, count=4, lengths=SHORT)
            learner.score()
            histories.append([learner.step(beta=1.0)["loss"] for _ in range(times)])
    largest = max(abs(mine - theirs) for mine, theirs in zip(*histories, strict=True))
    fell = histories[0][0] - histories[0][-1]
    yield Measure(id=f"{times} steps in fp32, loss beside a CPU's", value=largest, unit="nats", target="<= 1e-3")
    yield Measure(id=f"{times} steps in fp32, fall of the loss", value=fell, unit="nats", target=">= 1e-3")


def resume(context: Context) -> Iterator[Measure]:
    """Yields how far a step after loading a checkpoint is from the same step without loading."""
    learner = make(context, "bf16")
    learner.score()
    learner.step()
    folder = context.work / "checkpoint"
    learner.backend.save(folder)
    expected = learner.step()
    again = make(context, "bf16")
    again.reference = learner.reference
    again.backend.load(folder)
    found = again.step()
    weights = zip(shards(learner), shards(again), strict=True)
    differing = sum(int((mine != theirs).sum()) for mine, theirs in weights)
    yield Measure(id="resume: loss", value=abs(expected["loss"] - found["loss"]), unit="nats", target="<= 1e-3")
    yield Measure(id="resume: weights that differ", value=differing, unit="of all weights")


def resume_elsewhere(context: Context) -> Iterator[Measure]:
    """Yields the same for a killed process and a new one, with ``train.deterministic``: all must be equal."""
    killed, continued = (in_own_process(context, part) for part in ("killed", "continued"))
    name, apart = "resume in a new process, deterministic", abs(killed["loss"] - continued["loss"])
    same = float(killed["weights"] == continued["weights"])
    yield Measure(id=f"{name}: loss", value=apart, unit="nats", target="<= 0")
    yield Measure(id=f"{name}: the same weights", value=same, unit="1 is yes", target=">= 1")


def in_own_process(context: Context, part: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "gpu_steps.resumed",
        part,
        str(context.work),
        *(["--tiny"] if context.tiny else []),
    ]
    of_a_worker = gpu.environment(os.cpu_count() or 1, deterministic=True)
    ended = subprocess.run(command, env=environment() | of_a_worker, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode not in (0, -signal.SIGKILL) or not ended.stdout.strip():
        raise RuntimeError(f"the process that is {part} ended with {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


def shards(learner: Learner) -> list[torch.Tensor]:
    return [whole(shard.detach()) for shard in learner.backend._shards.values()]


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def export(context: Context) -> Iterator[Measure]:
    """Yields how far transformers' scores of the exported model are from the learner's."""
    learner = make(context, "fp32")
    learner.score()
    learner.step()
    folder = context.work / "exported"
    folder.mkdir(exist_ok=True)
    learner.backend.export_hf(folder)
    scores = learner.score()
    found = torch.stack([scores.real, scores.generated], dim=1).double().cpu()
    expected = one_by_one(context, folder, learner.rows, "fp32")
    worst = float((found - expected).abs().max())
    yield Measure(id="export, fp32", value=worst, unit="nats a response, largest", target="<= 1e-3")


def collectives(context: Context) -> Iterator[Measure]:
    ones = torch.ones(4, device=device_of(context))
    dist.all_reduce(ones)
    yield Measure(id=f"{dist.get_backend()}, a sum over one rank", value=float(ones.sum()), unit="", target=">= 4")


def make(context: Context, precision: str, *, count: int = 8, lengths: str = CHAT, **more: Any) -> Learner:
    """Returns a learner; in fp32, where errors are small enough to be seen, it is not compiled."""
    rows = pairs_of(context, lengths, count=count, model=MODEL)
    if precision == "fp32":
        more["compile"] = False
    return Learner(
        context, model_folder(context, MODEL), rows, per_step=count, precision=precision, learning_rate=RATE, **more
    )


@torch.no_grad()
def one_by_one(context: Context, folder: Path, rows: list[dict[str, Any]], precision: str) -> torch.Tensor:
    """Returns log p of both responses of each row by transformers alone, [rows, 2].

    The model computes in fp64 if ``precision`` is fp32, else in bf16.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.float64 if precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.to(device_of(context)).eval()

    def score(prompt: list[int], response: list[int]) -> float:
        ids = torch.tensor([prompt + response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        return float(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum())

    return torch.tensor(
        [[score(row["prompt_ids"], row[name]) for name in ("real_ids", "generated_ids")] for row in rows],
        dtype=torch.float64,
    )


def as_it_comes(item: Item) -> Item:

    def run(context: Context) -> Iterator[Measure]:
        with one_rank(group_of(context)), as_variant(BEST):
            yield from item(context)

    return run


ITEMS: dict[str, Item] = {
    "collectives": as_it_comes(collectives),
    "packed fp32": as_it_comes(partial(packed, "fp32")),
    "packed bf16": as_it_comes(partial(packed, "bf16")),
    "step zero": as_it_comes(step_zero),
    "export": as_it_comes(export),
    "resume, deterministic": resume_elsewhere,
    "resume": as_it_comes(resume),
    "steps beside a CPU": steps_beside_cpu,
}
