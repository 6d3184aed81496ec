"""Step 6: the pairs of step 5 through TRL's DPOTrainer, at its best and at its defaults.

TRL's best: precomputed reference scores, rows sorted by length, Liger's kernels, ``varlen_attn`` without padding.
TRL switches its ``padding_free`` off for DPO.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_steps.child import Context, Item
from gpu_steps.clock import peak_gb, synchronise
from gpu_steps.rows import Measure, values_of
from gpu_steps.sizes import CHAT, LONG, model_folder, pairs_of, sizes_of

MODEL = "1.5B"
MICRO_BATCH = 8
"""Pairs of a forward pass, TRL's default."""
KEPT_TOKENS = 16_384
"""Most padded tokens of a forward pass without checkpointing: activations of 1.5B then fit beside states on 80 GB."""


@dataclass(frozen=True, kw_only=True)
class Way:
    name: str
    best: bool
    checkpointing: bool


BEST = Way(name="TRL at its best", best=True, checkpointing=False)
CHECKPOINTED = Way(name="TRL at its best, checkpointing", best=True, checkpointing=True)
DEFAULTS = Way(name="TRL's defaults", best=False, checkpointing=True)


def side(way: Way, lengths: str, context: Context) -> Iterator[Measure]:
    if find_spec("trl") is None or find_spec("datasets") is None:
        yield Measure(id=f"{way.name}, {lengths}", value=None, unit="pairs/s", note="TRL not there")
        return
    sizes = sizes_of(context)
    rows = pairs_of(context, lengths, count=sizes.pairs)
    clock = _Clock(context)
    trainer = _trainer(context, way, rows, clock, steps=sizes.warm_up + sizes.steps)
    trainer.train()
    kept = sorted(clock.spent[sizes.warm_up :])
    spent = kept[len(kept) // 2]
    note = f"{trainer.args.per_device_train_batch_size} pairs a forward pass"
    yield Measure(id=f"{way.name}, {lengths}", value=len(rows) / spent, unit="pairs/s", note=note)
    yield Measure(id=f"{way.name}, {lengths}: peak memory", value=peak_gb(context), unit="GB")
    yield from _beside_ours(context, way, lengths, len(rows) / spent, peak_gb(context))


def _beside_ours(context: Context, way: Way, lengths: str, speed: float, memory: float) -> Iterator[Measure]:
    """Yields ratios to the rows of step 5. TRL's defaults score the reference in the step, so our scoring is added."""
    here = json.loads((context.work / "results.json").read_text())
    rows = values_of(Path(here["file"]), "step", here["facts"])
    ours = f"{MODEL}, {lengths}, best"
    training, scoring = rows.get(f"{ours}: training"), rows.get(f"{ours}: scoring")
    if not training or not scoring:
        why = "step 5 gave no speed with this card, commit and versions; add --only step"
        yield Measure(id=f"speed beside {way.name}, {lengths}", value=None, unit="", note=why)
        return
    mine = training if way.best else 1 / (1 / training + 1 / scoring)
    targets = {(BEST, CHAT): ">= 1.5", (BEST, LONG): ">= 1.8", (DEFAULTS, CHAT): ">= 2.2", (DEFAULTS, LONG): ">= 2.2"}
    yield Measure(
        id=f"speed beside {way.name}, {lengths}",
        value=mine / speed,
        unit="times",
        target=targets.get((way, lengths), ""),
    )
    if memory and way == BEST:
        share = rows[f"{ours}: peak memory"] / memory
        yield Measure(id=f"memory beside {way.name}, {lengths}", value=share, unit="share of TRL's", target="<= 0.7")


class _Clock:
    def __init__(self, context: Context) -> None:
        self.context, self.spent = context, []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                synchronise(clock.context)
                clock.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronise(clock.context)
                clock.spent.append(time.perf_counter() - clock.started)

        return Steps()


def _trainer(context: Context, way: Way, rows: list[dict[str, Any]], clock: _Clock, *, steps: int) -> Any:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    folder = model_folder(context, MODEL)
    ordered = sorted(rows, key=lambda row: sum(map(len, row.values()))) if way.best else rows
    names = {"prompt_ids": "prompt_ids", "real_ids": "chosen_ids", "generated_ids": "rejected_ids"}
    table = datasets.Dataset.from_list([{names[name]: ids for name, ids in row.items()} for row in ordered])
    micro = _micro_batch(way, ordered)
    best: dict[str, Any] = {"precompute_ref_log_probs": True, "max_length": None} if way.best else {}
    return Tokenised(
        model=AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=_varlen() if way.best and not context.tiny else "sdpa"
        ),
        args=DPOConfig(
            output_dir=str(context.work / "trl"), use_cpu=context.tiny, bf16=True, beta=0.1,
            gradient_checkpointing=way.checkpointing, per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(rows) // micro, max_steps=steps, optim="rmsprop", learning_rate=1e-6,
            lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=steps, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=not context.tiny,
            use_liger_kernel=way.best and not context.tiny and find_spec("liger_kernel") is not None, **best,
        ),
        train_dataset=table,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock.callback()],
    )  # fmt: skip


def _micro_batch(way: Way, rows: list[dict[str, Any]]) -> int:
    """Returns the pairs of a forward pass, a divisor of all pairs; fewer where kept activations would not fit."""
    longest = max(len(row["prompt_ids"]) + max(len(row["real_ids"]), len(row["generated_ids"])) for row in rows)
    micro = math.gcd(MICRO_BATCH, len(rows))
    while not way.checkpointing and micro > 1 and 2 * micro * longest > KEPT_TOKENS:
        micro //= 2
    return micro


def _varlen() -> str:
    """Registers attention without padding; returns its name, or ``sdpa`` if torch lacks it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "sdpa"
    import inspect

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    # torch 2.11 takes grouped heads without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        batch, _, length, _ = query.shape
        places, stops, longest = _unpadded(attention_mask, batch, length, query.device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[places].bfloat16() for x in (query, key, value))
        found = varlen_attn(
            q, k, v, stops, stops, longest, longest, scale=settings.get("scaling"), window_size=(-1, 0), **grouped
        )
        whole = found.new_zeros(batch * length, *found.shape[1:]).index_put((places,), found)
        return whole.view(batch, length, *found.shape[1:]).to(query.dtype), None

    AttentionInterface.register("trl_varlen", attend)
    AttentionMaskInterface.register("trl_varlen", flash_attention_mask)
    return "trl_varlen"


def _unpadded(mask: Tensor | None, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Returns places of real tokens, cumulative lengths, and the longest; computed once a mask, not once a layer."""
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    if not hasattr(mask, "unpadded"):
        lengths = mask.sum(dim=1, dtype=torch.int32)
        stops = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        mask.unpadded = (mask.flatten().nonzero().squeeze(1), stops, int(lengths.max()))  # type: ignore[attr-defined]
    return mask.unpadded  # type: ignore[attr-defined]


ITEMS: dict[str, Item] = {
    f"{way.name}, {lengths}": partial(side, way, lengths)
    for way in (BEST, DEFAULTS, CHECKPOINTED)
    for lengths in (CHAT, LONG)
}
