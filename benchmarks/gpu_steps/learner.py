"""The learner of one rank on the device, or with former versions of its parts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist

from gpu_steps.attention import Loop
from gpu_steps.child import Context
from gpu_steps.sizes import device_of, sizes_of, table_of
from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.learner.attention import ATTENTIONS
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.step import (
    Objective,
    PackShape,
    ReferenceScores,
    pair_lengths,
    plan,
    score_rows,
    train_step,
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One state of the ablation: ``as is`` is the former learner; each following state changes one thing."""

    name: str
    attention: str | None = None
    """``loop`` or a name of ``learner.attention``; None: the learner chooses."""
    small_head: bool = False
    """True: the head computes chunks of 256 rows."""
    compile: bool | Literal["auto"] = "auto"
    """``auto`` is a recipe's default."""
    prefetch: bool = True


def variants() -> tuple[Variant, ...]:
    return (
        Variant(name="as is", attention="loop", small_head=True, compile=False, prefetch=False),
        Variant(name="+ attention", small_head=True, compile=False, prefetch=False),
        Variant(name="+ head", compile=False, prefetch=False),
        Variant(name="+ compile", prefetch=False),
        Variant(name="+ prefetch"),
    )


BEST = Variant(name="best")


@contextmanager
def as_variant(variant: Variant) -> Iterator[None]:
    """Puts former parts in the learner's place."""
    with ExitStack() as stack:

        def put(place: str, value: Any) -> None:
            stack.enter_context(mock.patch(f"spin_ray.learner.{place}", value))

        if variant.attention:
            put("layout.candidates", lambda *_: (variant.attention,))
            stack.enter_context(mock.patch.dict(ATTENTIONS, {"loop": Loop()}))
        if variant.small_head:
            put("head.ROWS_PER_CHUNK", {})
            put("scoring.target_logps", head_in_small_chunks)
        if not variant.prefetch:
            put("step.feed", feed_in_turn)
        yield


def head_in_small_chunks(head: Any, *arguments: Any, fused: bool) -> torch.Tensor:
    """Computes the head in checkpointed chunks of 256 rows, each with a gradient of the whole head."""
    from spin_ray.learner.head import target_logps

    return target_logps(lambda hidden: head(hidden), *arguments, rows=256)


def feed_in_turn(packs: Sequence[Any], table: Any, shape: PackShape, device: torch.device) -> Iterator[Any]:
    """Builds each pack when it is asked for, and waits for its copy."""
    for pack in packs:
        batch = shape.build(pack, table)
        yield batch.num_useful_tokens, batch.to(device)


class Learner:
    """A backend, the steps over some rows, and the rows' reference scores."""

    def __init__(
        self,
        context: Context,
        folder: Path,
        rows: list[dict[str, Any]],
        *,
        per_step: int,
        precision: str = "bf16",
        checkpointing: bool = False,
        lora: bool = False,
        learning_rate: float = 1e-6,
        variant: Variant = BEST,
        device: torch.device | None = None,
        **more: Any,
    ) -> None:
        from spin_ray.learner.backends.fsdp2 import Fsdp2Backend

        self.device = device or device_of(context)
        sizes = sizes_of(context)
        settings = BackendSettings(
            max_length=sizes.longest, precision=precision, gradient_checkpointing=checkpointing,
            optimizer=OptimizerConfig(schedule="constant", warmup_fraction=0), learning_rate=learning_rate,
            total_steps=10**6, lora=LoraConfig() if lora else None,
            **({"compile": variant.compile} | more),
        )  # fmt: skip
        self.backend: Any = Fsdp2Backend(folder, settings, self.device)
        self.rows, self.table = rows, table_of(rows)
        self.shape = PackShape(pack_length=sizes.train_pack, global_batch_pairs=per_step, pad_id=0)
        (self.steps,) = plan(pair_lengths([self.table]), self.shape, epochs=1, seed=0)
        self.reference: ReferenceScores | None = None

    def score(self) -> ReferenceScores:
        order, real, generated = score_rows(self.backend, self.steps, self.table, self.shape)
        places = torch.tensor(order).argsort()
        columns = (torch.tensor(values)[places].to(self.device) for values in (real, generated))
        self.reference = ReferenceScores(**dict(zip(("real", "generated"), columns, strict=True)))
        return self.reference

    def step(self, number: int = 0, beta: float = 0.1) -> dict[str, float]:
        assert self.reference is not None, "score first"
        objective = Objective(loss="logistic", beta=beta)
        return train_step(self.backend, self.steps[number], self.table, self.shape, objective, self.reference)


@contextmanager
def one_rank(backend: str = "gloo") -> Iterator[None]:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def group_of(context: Context) -> str:
    return "gloo" if context.tiny else "nccl"
