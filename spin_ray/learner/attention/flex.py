"""FlexAttention: one compiled kernel for the whole pack, which skips fully masked blocks.

Its backward pass has no atomic additions, so gradients are reproducible.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from spin_ray.config.compilers import missing_tools
from spin_ray.learner.attention.base import Window, effective_windows, to_device
from spin_ray.learner.attention.capability import shared_memory, too_old
from spin_ray.learner.attention.hook import allow_many_graphs
from spin_ray.learner.attention.rule import Token, key_ranges, sees
from spin_ray.learner.batch import PackedBatch

BLOCK = 128
"""Tokens per block, FlexAttention's default."""
_OF_BLOCKS = tuple(
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
)
"""Tensors of a ``BlockMask``; ``BlockMask.to`` would wait for the device at each."""
_ROOMY = 128 * 1024
"""Shared memory, in bytes, in which torch's own tiles of wide heads fit; from the RTX 3090 to the 5090 it is 99 KiB."""
_TORCHS_WIDTH = 128
"""Widest heads whose tiles fit every GPU."""


class Flex:
    name = "flex"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cuda" and find_spec("triton") is None:
            return "FlexAttention needs triton, which is not installed"
        if device.type == "cuda" and (missing := missing_tools()):
            return f"FlexAttention needs {missing}"
        return too_old(device, "FlexAttention")

    def prepare(
        self, batch: PackedBatch, windows: Sequence[Window], device: torch.device, dtype: torch.dtype
    ) -> "FlexPlan":
        needed = effective_windows(batch, windows)
        made = {window: block_mask(batch, window, device) for window in set(needed.values())}
        return FlexPlan({window: made[effective] for window, effective in needed.items()})


@dataclass(frozen=True, slots=True)
class FlexPlan:
    block_masks: dict[Window, BlockMask]

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
        settings: dict[str, Any] = {
            "score_mod": None if softcap is None else _capping(softcap, query.device),
            "block_mask": self.block_masks[window],
            "scale": scaling,
            "enable_gqa": query.shape[1] != key.shape[1],
            "kernel_options": kernel_options(query),
        }
        kernel = _kernel(query.device.type)
        if sinks is None:
            return kernel(query, key, value, **settings).transpose(1, 2).contiguous()
        attended, aux = kernel(query, key, value, return_aux=AuxRequest(lse=True), **settings)
        # With the sink, the softmax's denominator exp(lse) grows by exp(sink).
        shares = torch.sigmoid(aux.lse - sinks.float()[None, :, None])[..., None]
        return (attended * shares).to(query.dtype).transpose(1, 2).contiguous()


def kernel_options(query: Float[Tensor, "1 heads tokens width"]) -> dict[str, Any]:
    """Returns FlexAttention's options: smaller tiles where torch's own do not fit, for which Triton's build fails."""
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}  # else short packs use another kernel
    width = query.shape[-1]
    if query.device.type != "cuda" or query.itemsize > 2 or width <= _TORCHS_WIDTH:  # fp32 has tiles of 16 × 16
        return options
    if shared_memory(query.device) >= _ROOMY:
        return options
    if width <= 2 * _TORCHS_WIDTH:
        return options | {f"bwd_BLOCK_{side}": 32 for side in ("M1", "N1", "M2", "N2")} | {"bwd_num_stages": 1}
    return options | {"fwd_BLOCK_M": 16, "fwd_BLOCK_N": 16, "fwd_num_stages": 1}


@functools.cache
def _capping(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """Returns the ``score_mod`` of soft-capping; a compiled float would become a CPU tensor."""
    limit = torch.full((), softcap, device=device)

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return cap


def _kernel(device_type: str) -> Callable[..., Any]:
    if device_type == "cpu" or torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Compiles for every pack length at once, so that scoring and training run one kernel.

    Uncompiled, FlexAttention would hold all scores in memory.
    """
    allow_many_graphs()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask(batch: PackedBatch, window: Window, device: torch.device) -> BlockMask:
    """Builds the block mask on the CPU from the pack's runs.

    ``create_block_mask`` would evaluate the rule for all pairs of tokens.
    """
    seen = seen_pairs(batch, window)
    tokens = batch.runs[-1].stop
    full = seen == BLOCK * BLOCK
    blocks = BlockMask.from_kv_blocks(
        *_ordered((seen > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod(batch.to(device), window),
        seq_lengths=(tokens, tokens),
    )
    tensors: dict[str, Any] = {name: to_device(getattr(blocks, name), device) for name in _OF_BLOCKS}
    return BlockMask(seq_lengths=blocks.seq_lengths, BLOCK_SIZE=blocks.BLOCK_SIZE, mask_mod=blocks.mask_mod, **tensors)


def mask_mod(batch: PackedBatch, window: Window) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    tree, branch, position = batch.tree, batch.branch, batch.position_ids

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(
            Token(query, tree[query], branch[query], position[query]),
            Token(key, tree[key], branch[key], position[key]),
            window,
        )

    return seen


def seen_pairs(batch: PackedBatch, window: Window) -> np.ndarray:
    """Counts the visible pairs in each block, [query blocks, key blocks]."""
    starts, stops = key_ranges(batch, window)
    rows = -(-starts.shape[1] // BLOCK)
    query_block = np.arange(starts.shape[1]) // BLOCK
    counts = np.zeros(rows * rows)
    for start, stop in zip(starts, stops, strict=True):
        first = start // BLOCK
        for further in range(int(((stop - 1) // BLOCK - first).max(initial=-1)) + 1):
            block = np.minimum(first + further, rows - 1)
            inside = np.minimum(stop, (first + further + 1) * BLOCK) - np.maximum(start, (first + further) * BLOCK)
            counts += np.bincount(query_block * rows + block, np.maximum(inside, 0), rows * rows)
    return counts.reshape(rows, rows).astype(np.int64)


def _ordered(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    order = np.argsort(~chosen, axis=1, kind="stable")  # chosen key blocks first
    return tuple(torch.from_numpy(x.astype(np.int32))[None, None] for x in (chosen.sum(axis=1), order))  # type: ignore[return-value]
