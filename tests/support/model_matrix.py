"""Compares spin_ray with transformers alone on a model family: scores, one step, export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import OptimizerConfig
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.losses import margins, pair_logps, spin_loss
from tests.support.learner_cases import Row, batches_of, logp_alone, random_rows
from tests.support.model_kinds import MAX_LENGTH, ModelKind

ROWS: list[Row] = random_rows(3, trees=3, longest=20)
BETA = 0.1
"""Margins of random models are many nats: a larger beta would leave gradients of nearly 0."""
DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Largest differences from transformers' own attention, one response at a time, in fp32."""

    layout: str
    logps: float
    """Nats a response."""
    gradients: float
    """Relative to the largest gradient of the same tensor."""
    loss: float
    plain_loss: float
    moved: float
    export: float
    """Difference between transformers' log-probabilities of the export and ours, nats a response."""
    same_names: bool
    """True: the export has the tensors and dtypes of the start folder."""


def examine(kind: ModelKind, folder: Path) -> Outcome:
    """Trains one step; needs a process group. ``folder`` gets the model and its export."""
    start, target = folder / "start", folder / "export"
    kind.make().save_pretrained(start)
    plain = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation=kind.truth).eval()
    backend = _backend(start)
    with torch.no_grad():
        found, expected = _scores(backend), _alone(plain)
        logps = (found - expected).abs().max()
    plain_loss = _loss(_alone(plain))
    plain_loss.backward()
    loss = torch.zeros(())
    batches = batches_of(ROWS, pack_length=MAX_LENGTH)
    for number, batch in enumerate(batches):
        real, generated = pair_logps(backend.logps(batch), batch)
        zero = torch.zeros_like(real)
        part = spin_loss(margins(real, generated, zero, zero, BETA)) / len(ROWS)
        backend.backward(part, last_microbatch=number == len(batches) - 1)
        loss += part.detach()
    gradients = max(_relative(_whole(share.grad), dict(plain.named_parameters())[name].grad)
                    for name, share in backend._shards.items())  # fmt: skip
    before = {name: _whole(share).clone() for name, share in backend._shards.items()}
    backend.step()
    moved = max(float((_whole(share) - before[name]).abs().max()) for name, share in backend._shards.items())
    backend.export_hf(target)
    after = AutoModelForCausalLM.from_pretrained(target, dtype="auto", attn_implementation=kind.truth).eval()
    with torch.no_grad():
        export = (_scores(backend) - _alone(after)).abs().max()
    return Outcome(
        layout=backend._scorer.layout, logps=float(logps), gradients=gradients, loss=float(loss),
        plain_loss=plain_loss.item(), moved=moved, export=float(export), same_names=_tensors(start) == _tensors(target),
    )  # fmt: skip


def _backend(folder: Path) -> Fsdp2Backend:
    settings = BackendSettings(
        max_length=MAX_LENGTH, precision="fp32", optimizer=OptimizerConfig(name="adamw"), learning_rate=1e-3,
        total_steps=1,
    )  # fmt: skip
    return Fsdp2Backend(folder, settings, torch.device("cpu"))


def _scores(backend: Fsdp2Backend) -> Tensor:
    scores = torch.zeros(len(ROWS), 2)
    for batch in batches_of(ROWS, pack_length=MAX_LENGTH):
        scores[batch.pair_row] = torch.stack([*pair_logps(backend.score(batch), batch)], dim=1)
    return scores


def _alone(model: Any) -> Tensor:
    logp = logp_alone.__wrapped__  # with gradients where they are wanted
    return torch.stack([torch.stack([logp(model, prompt, each) for each in responses]) for prompt, *responses in ROWS])


def _loss(logps: Tensor) -> Tensor:
    """Returns SPIN's loss, equation 4.7 with a reference of 0."""
    return -logsigmoid(BETA * (logps[:, 0] - logps[:, 1])).mean()


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None:  # a weight that nothing used, e.g. of an expert
        return max(float(each.abs().max()) for each in (found, expected, torch.zeros(1)) if each is not None)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def _tensors(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    return found
