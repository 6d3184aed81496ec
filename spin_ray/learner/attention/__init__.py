"""Attention within packs: one visibility rule and four implementations.

name     device  precision    computes
trees    CPU     any          each tree by itself
flex     CUDA    any          FlexAttention; soft-capping, windows, sinks
varlen   CUDA    bf16, fp16   variable-length Flash Attention; windows
dense    any     any          the whole pack with a dense mask, for tests
"""

import torch

from spin_ray.learner.attention.base import Attention, AttentionPlan
from spin_ray.learner.attention.dense import Dense
from spin_ray.learner.attention.flex import Flex
from spin_ray.learner.attention.hook import IMPLEMENTATION
from spin_ray.learner.attention.trees import Trees
from spin_ray.learner.attention.varlen import Varlen

ATTENTIONS: dict[str, Attention] = {way.name: way for way in (Trees(), Flex(), Varlen(), Dense())}

__all__ = ["ATTENTIONS", "IMPLEMENTATION", "Attention", "AttentionPlan", "candidates"]


def candidates(device: torch.device) -> tuple[str, ...]:
    """Returns the implementations for ``device``, the preferred one first."""
    return ("trees",) if device.type == "cpu" else ("flex", "varlen")
