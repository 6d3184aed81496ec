"""The attention function that transformers calls in every layer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spin_ray.learner.attention.base import AttentionPlan

IMPLEMENTATION = "spin_ray_packs"
"""Name of ``attend`` among transformers' attention implementations."""
MOST_GRAPHS = 64
"""Graphs of one function: kinds of layers, precisions and gradient modes each make their own."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_plan: AttentionPlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attends by the pack's plan.

    Without one, which some models lose and rows do not need, SDPA attends by the mask.

    Raises:
        NotImplementedError: the scores are changed in a way that the kernel would ignore.
    """
    if position_bias is not None:
        raise NotImplementedError("attention within packs cannot add position_bias")
    if attention_plan is None:
        if softcap is not None or s_aux is not None:
            raise NotImplementedError("SDPA would ignore soft-capping and sinks")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    attended = attention_plan.attend(
        query, key, value, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return attended, None


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def allow_many_graphs() -> None:
    """Raises dynamo's limit of graphs of one function, beyond which it would quietly run the function uncompiled."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)


def keep_out_of_graphs() -> None:
    """Makes compiled layers call ``attend`` between their graphs.

    Plans differ from pack to pack, and attention's kernels stay those of uncompiled layers.
    """
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attend))
