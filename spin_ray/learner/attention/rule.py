"""The rule that says which tokens of a pack see which others."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from spin_ray.learner.attention.base import Window
from spin_ray.learner.batch import PackedBatch


class Token(NamedTuple):
    """Tokens, as four tensors that broadcast."""

    place: Tensor
    tree: Tensor
    branch: Tensor
    position: Tensor


def sees(query: Token, key: Token, window: Window) -> Bool[Tensor, "..."]:
    """Returns True where the query sees the key.

    A query sees itself and earlier tokens of its tree's prompt and its own response, within the window.
    Padding sees itself, as a row that sees nothing would be nan.
    """
    seen = (query.tree == key.tree) & (query.place >= key.place)
    seen = seen & ((key.branch == 0) | (query.branch == key.branch))
    if window is not None:
        seen = seen & (query.position - key.position < window)
    return (seen & (query.tree >= 0)) | (query.place == key.place)


def visible(batch: PackedBatch, window: Window = None) -> Bool[Tensor, "tokens tokens"]:
    """Returns ``sees`` for all pairs, [query, key]."""
    place = torch.arange(len(batch.tree), device=batch.tree.device)
    tokens = (place, batch.tree, batch.branch, batch.position_ids)
    return sees(Token(*(x[:, None] for x in tokens)), Token(*(x[None, :] for x in tokens)), window)


def key_ranges(batch: PackedBatch, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Returns two ranges of visible keys for each query, as starts and stops [2, tokens] on the CPU.

    The first range is within the prompt of a response (else empty), the second within the query's own run.
    """
    tokens = batch.runs[-1].stop if batch.runs else 0
    place = np.arange(tokens)
    start, stop = np.zeros((2, tokens), np.int64), np.zeros((2, tokens), np.int64)
    prompt = (0, 0)
    for run in batch.runs:
        own = slice(run.start, run.stop)
        stop[1, own] = place[own] + 1
        if run.tree < 0:
            start[1, own] = place[own]
            continue
        if run.branch == 0:
            prompt = (run.start, run.stop)
        reach = np.arange(run.stop - run.start)  # number of earlier tokens in the query's own run
        start[1, own] = run.start if window is None else run.start + np.maximum(reach - window + 1, 0)
        if run.branch:
            start[0, own], stop[0, own] = prompt
            if window is not None:
                start[0, own] = np.minimum(np.maximum(prompt[0], prompt[1] + reach - window + 1), prompt[1])
    return start, stop
