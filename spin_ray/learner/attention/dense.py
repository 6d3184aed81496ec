"""Attention by plain matrix products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spin_ray.learner.attention.base import Window, effective_windows
from spin_ray.learner.attention.rule import visible
from spin_ray.learner.batch import PackedBatch


class Dense:
    """The whole pack with a dense mask: exact in any precision, for small packs."""

    name = "dense"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(
        self, batch: PackedBatch, windows: Sequence[Window], device: torch.device, dtype: torch.dtype
    ) -> "DensePlan":
        return DensePlan(additive_masks(batch.to(device), windows, dtype))


@dataclass(frozen=True, slots=True)
class DensePlan:
    masks: dict[Window, Float[Tensor, "1 1 tokens tokens"]]

    @property
    def mask(self) -> Float[Tensor, "1 1 tokens tokens"]:
        return self.masks[None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, window: Window, **settings: Any) -> Tensor:
        return attend_by_products(query, key, value, self.masks[window], **settings)


def additive_masks(
    batch: PackedBatch, windows: Sequence[Window], dtype: torch.dtype
) -> dict[Window, Float[Tensor, "1 1 tokens tokens"]]:
    """Returns a mask for each window; windows longer than every sequence share one."""
    needed = effective_windows(batch, windows)
    made = {window: additive_mask(visible(batch, window), dtype)[None, None] for window in set(needed.values())}
    return {window: made[effective] for window, effective in needed.items()}


def additive_mask(seen: Bool[Tensor, "tokens tokens"], dtype: torch.dtype) -> Float[Tensor, "tokens tokens"]:
    """Returns 0 where seen, else -inf.

    Given booleans, SDPA would make and keep this tensor in every layer.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def attend_by_products(
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens value_width"],
    mask: Float[Tensor, "1 1 tokens tokens"],
    *,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Float[Tensor, "heads"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "1 tokens heads value_width"]:
    """Returns softmax(cap(QKᵀ · scaling) + mask)V, one product per key head, in ``dtype`` (default: the query's)."""
    heads, tokens, width = query.shape[1:]
    kv_heads, dtype = key.shape[1], dtype or query.dtype
    queries, keys, values = query.reshape(kv_heads, -1, width).to(dtype), key[0].to(dtype), value[0].to(dtype)
    seen = mask[0].to(dtype).repeat(1, heads // kv_heads, 1)
    scaling = scaling or width**-0.5
    if softcap is None:
        scores = torch.baddbmm(seen, queries, keys.transpose(1, 2), alpha=scaling)
    else:
        scores = softcap * torch.tanh(torch.bmm(queries, keys.transpose(1, 2)) * (scaling / softcap)) + seen
    if sinks is None:
        shares = scores.softmax(dim=-1)
    else:
        sink = sinks.to(dtype).view(kv_heads, -1, 1, 1).expand(-1, -1, tokens, 1).reshape(kv_heads, -1, 1)
        shares = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    attended = torch.bmm(shares, values).to(query.dtype)
    return attended.view(1, heads, tokens, value.shape[-1]).transpose(1, 2)
