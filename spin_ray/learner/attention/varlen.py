"""Variable-length Flash Attention: every prompt and every response is a sequence of its own.

    queries   prompt            response 1        response 2
    keys      prompt            prompt response 1 prompt response 2     (gathered)

Causal masks are aligned to the bottom right, so a response sees its whole prompt and its own past.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from spin_ray.learner.attention.base import Window, effective_windows, to_device
from spin_ray.learner.attention.capability import too_old
from spin_ray.learner.batch import PackedBatch

LENGTHS_MULTIPLE = 256
"""Multiple to which longest lengths are rounded up, as compiled code is specialised on them."""


class Varlen:
    name = "varlen"

    def __init__(self, kernel: Callable[..., Tensor] | None = None) -> None:
        """Uses ``kernel`` in place of torch's ``varlen_attn``."""
        self._kernel = kernel

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"varlen_attn computes in bf16 or fp16, not in {str(dtype).removeprefix('torch.')}"
        if device.type != "cuda":
            return f"varlen_attn is for CUDA, not for {device.type}"
        return too_old(device, "varlen_attn")

    def prepare(
        self, batch: PackedBatch, windows: Sequence[Window], device: torch.device, dtype: torch.dtype
    ) -> "VarlenPlan":
        keys, query_stops, key_stops = gathered(batch)
        return VarlenPlan(
            kernel=self._kernel or _kernel(),
            keys=to_device(torch.from_numpy(keys), device),
            query_stops=to_device(torch.from_numpy(query_stops), device),
            key_stops=to_device(torch.from_numpy(key_stops), device),
            longest_query=_rounded_longest(query_stops),
            longest_key=_rounded_longest(key_stops),
            windows=effective_windows(batch, windows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenPlan:
    kernel: Callable[..., Tensor]
    keys: Int64[Tensor, "gathered"]
    query_stops: Int32[Tensor, "sequences+1"]
    key_stops: Int32[Tensor, "sequences+1"]
    longest_query: int
    longest_key: int
    windows: dict[Window, Window]

    @property
    def mask(self) -> None:
        return None

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
        if softcap is not None:
            raise NotImplementedError("attention varlen cannot compute soft-capped scores")
        if sinks is not None:
            raise NotImplementedError("attention varlen cannot compute attention sinks")
        window = self.windows[window]
        attended = self.kernel(
            query[0].transpose(0, 1).contiguous(),
            key[0].transpose(0, 1).index_select(0, self.keys),
            value[0].transpose(0, 1).index_select(0, self.keys),
            self.query_stops,
            self.key_stops,
            self.longest_query,
            self.longest_key,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
        )
        return attended[None]


def gathered(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the keys' indices (int64), and the cumulative lengths of queries and keys (int32, from 0).

    Padding is one causal sequence, whose output is never read.
    """
    keys: list[np.ndarray] = []
    prompt = np.arange(0)
    for run in batch.runs:
        own = np.arange(run.start, run.stop)
        if run.branch == 0:
            prompt = own
        keys.append(own if run.branch == 0 else np.concatenate([prompt, own]))
    query_stops = np.cumsum([0, *(run.stop - run.start for run in batch.runs)])
    key_stops = np.cumsum([0, *(len(part) for part in keys)])
    return np.concatenate(keys), query_stops.astype(np.int32), key_stops.astype(np.int32)


def _rounded_longest(stops: np.ndarray) -> int:
    return -(-int(np.diff(stops).max()) // LENGTHS_MULTIPLE) * LENGTHS_MULTIPLE


def _kernel() -> Callable[..., Tensor]:
    """Returns torch's ``varlen_attn`` for grouped heads and without splits of the keys.

    Splits would make a sequence's numbers depend on the others of its pack.
    """
    from torch.nn.attention.varlen import varlen_attn  # slow, and for GPUs only

    return cast(Callable[..., Tensor], partial(varlen_attn, enable_gqa=True, num_splits=1))
