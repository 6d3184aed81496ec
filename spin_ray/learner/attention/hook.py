"""The attention function that transformers calls in every layer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spin_ray.learner.attention.base import AttentionPlan

IMPLEMENTATION = "spin_ray_packs"
MOST_GRAPHS = 64
"""Graphs per function: each kind of layer, precision and gradient mode makes its own."""


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
    """Attends by the pack's plan, or by SDPA with the mask where the model does not pass the plan on.

    Raises:
        NotImplementedError: the kernel would ignore a change of the scores.
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
    """Raises dynamo's limit of graphs per function, above which functions silently run uncompiled."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)


def keep_out_of_graphs() -> None:
    """Makes compiled layers call ``attend`` between their graphs.

    Plans differ from pack to pack, and attention keeps the kernels of uncompiled layers.
    """
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attend))
