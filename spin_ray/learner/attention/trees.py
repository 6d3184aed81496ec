"""Attention on CPUs, tree by tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv

from spin_ray.learner.attention.base import Window
from spin_ray.learner.attention.dense import additive_masks, attend_by_products
from spin_ray.learner.batch import PackedBatch

DENSE_TREES = {torch.bfloat16: 512, torch.float32: 128}
"""Longest tree, in tokens, with plain matrix products (times: benchmarks/README.md)."""
EXACT_TREES = 128
"""Longest tree whose plain products are at least fp32."""


class Trees:
    name = "trees"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":  # SDPA's kernels need masks aligned to 16 bytes, which slices of a mask are not
            return f"attention by trees is for CPUs, not for {device.type}"
        return None

    def prepare(
        self, batch: PackedBatch, windows: Sequence[Window], device: torch.device, dtype: torch.dtype
    ) -> "TreesPlan":
        return TreesPlan(tree_spans(batch), additive_masks(batch, windows, dtype))


@dataclass(frozen=True, slots=True)
class TreesPlan:
    spans: tuple[tuple[int, int], ...]
    masks: dict[Window, Float[Tensor, "1 1 tokens tokens"]]

    @property
    def mask(self) -> Float[Tensor, "1 1 tokens tokens"]:
        return self.masks[None]

    def attend(
        self,
        query: Float[Tensor, "1 heads tokens width"],
        key: Float[Tensor, "1 kv_heads tokens width"],
        value: Float[Tensor, "1 kv_heads tokens width"],
        *,
        scaling: float | None,
        window: Window,
        softcap: float | None,
        sinks: Float[Tensor, "heads"] | None,
    ) -> Float[Tensor, "1 tokens heads width"]:
        sizes = [stop - start for start, stop in self.spans]
        mask = self.masks[window]
        groups = query.shape[1] // key.shape[1]
        trees = zip(self.spans, *(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
        outputs = []
        for (start, stop), q, k, v in trees:
            seen = mask[..., start:stop, start:stop]
            if softcap is not None or sinks is not None or stop - start <= DENSE_TREES.get(query.dtype, 0):
                dtype = torch.promote_types(q.dtype, torch.float32) if stop - start <= EXACT_TREES else None
                attended = attend_by_products(q, k, v, seen, scaling=scaling, softcap=softcap, sinks=sinks, dtype=dtype)
            else:
                k, v = repeat_kv(k, groups), repeat_kv(v, groups)
                attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
                attended = attended.transpose(1, 2).contiguous()
            outputs.append(attended)
        return torch.cat(outputs, dim=1)


def tree_spans(batch: PackedBatch) -> tuple[tuple[int, int], ...]:
    """Returns [start, stop) of every tree and the padding."""
    starts = [run.start for run in batch.runs if run.branch == 0]
    return tuple(pairwise([*starts, len(batch.tree)]))
