"""The tensors of one pack.

Dimensions in all signatures:

    tokens    tokens of one pack, padding included
    targets   response tokens
    segments  responses (branches)
    pairs     (real, generated) pairs
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor


class Run(NamedTuple):
    """Adjacent tokens of one prompt, of one response, or of the padding."""

    start: int
    stop: int
    tree: int
    branch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One pack: several trees in a single sequence.

    A tree is a prompt followed by its responses.
    Each response continues the prompt's positions and sees only the prompt and itself.

    Example: prompt ``[5, 6]``, real ``[7, 2]``, generated ``[8]``, pack length 6::

        input_ids     5  6  7  2  8  0
        position_ids  0  1  2  3  2  0
        tree          0  0  0  0  0 -1
        branch        0  0  1  1  2  0
        predict_at    1  2  1      target_ids  7  2  8      segment  0  0  1
    """

    input_ids: Int64[Tensor, "tokens"]
    position_ids: Int64[Tensor, "tokens"]
    tree: Int64[Tensor, "tokens"]
    """Number of the tree; -1 marks padding (the pad id may equal the end-of-turn id)."""
    branch: Int64[Tensor, "tokens"]
    """0 for the prompt, 1, 2, … for its responses."""
    predict_at: Int64[Tensor, "targets"]
    """Index of the token that predicts the target."""
    target_ids: Int64[Tensor, "targets"]
    segment: Int64[Tensor, "targets"]
    """Number of the target's response."""
    num_segments: int
    real_segment: Int64[Tensor, "pairs"]
    generated_segment: Int64[Tensor, "pairs"]
    """-1 without y′ (SFT)."""
    pair_row: Int64[Tensor, "pairs"]
    """Row in the table."""
    runs: tuple[Run, ...]
    """The same layout for the CPU; a tree's prompt precedes its responses."""
    initial_segment: Int64[Tensor, "pairs"] | None = None
    """θ_0's response, for rows with ``initial_ids`` (T-SPIN)."""

    @property
    def num_useful_tokens(self) -> int:
        """Returns the number of tokens without padding."""
        return sum(run.stop - run.start for run in self.runs if run.tree >= 0)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """Returns the batch with every tensor changed."""
        tensors = {name: change(value) for name in self.__slots__ if isinstance(value := getattr(self, name), Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device) -> "PackedBatch":
        return self.map(lambda tensor: tensor.to(device))
