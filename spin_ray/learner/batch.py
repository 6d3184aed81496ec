"""The tensors of one pack.

Legend of dimensions, used in every signature of the package:

    tokens    tokens of one pack (one of a few lengths; the tail is padding)
    targets   response tokens of one pack: those whose log-probability is wanted
    segments  responses (branches) of one pack
    pairs     (real, generated) pairs of one pack
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One pack: several shared-prompt trees behind one another in a single sequence.

    A tree is a prompt followed by its responses. Every response continues the prompt's positions and sees the prompt
    and itself, never a sibling or another tree, so one forward pass scores all of them as if each stood alone.

    Example: prompt ``[5, 6]``, real ``[7, 2]``, generated ``[8]``, pack length 6::

        input_ids     5  6  7  2  8  0
        position_ids  0  1  2  3  2  0
        tree          0  0  0  0  0 -1
        branch        0  0  1  1  2  0
        predict_at    1  2  1      target_ids  7  2  8      segment  0  0  1
        real_segment  0            generated_segment  1     pair_row  (row of the pair in its table)
    """

    input_ids: Int64[Tensor, "tokens"]
    position_ids: Int64[Tensor, "tokens"]
    tree: Int64[Tensor, "tokens"]
    """Number of the tree a token belongs to; -1 marks padding (the pad id may equal the end-of-turn id)."""
    branch: Int64[Tensor, "tokens"]
    """0 for the prompt, 1, 2, … for the responses of the tree."""
    predict_at: Int64[Tensor, "targets"]
    """Position whose hidden state predicts the target: the last prompt token for the first token of a response."""
    target_ids: Int64[Tensor, "targets"]
    segment: Int64[Tensor, "targets"]
    """Response that the target belongs to, 0 … num_segments - 1."""
    num_segments: int
    real_segment: Int64[Tensor, "pairs"]
    generated_segment: Int64[Tensor, "pairs"]
    """Segment of y′; -1 for a row that has none (SFT)."""
    pair_row: Int64[Tensor, "pairs"]
    """Row of the pair in the table that the pack was built from."""

    @property
    def num_pairs(self) -> int:
        return self.pair_row.shape[0]

    @property
    def num_useful_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.tree >= 0).sum())

    def to(self, device: torch.device) -> "PackedBatch":
        """Returns the same pack on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name in self.__slots__
            for value in [getattr(self, name)]
        }
        return PackedBatch(**moved)
