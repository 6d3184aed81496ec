"""A Hugging Face causal LM as a scorer: pack in, log p(response | prompt) out.

Packed layout: one sequence, whose branches a 4-D mask keeps apart.
Padded layout, for models without 4-D masks: every response is a row.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.losses import response_logps

Layout = Literal["packed", "padded"]
Head = Callable[[Tensor], Tensor]

TARGETS_PER_CHUNK = 256
"""Rows of the LM head at a time; small chunks cost memory traffic for the head's gradient."""
TARGETS_MULTIPLE = 64
"""Multiple that targets are padded to: every new shape costs oneDNN new kernels."""
DENSE_TREES = {torch.bfloat16: 512, torch.float32: 128}
"""Longest tree, in tokens, attended by plain matrix products on a CPU (times: benchmarks/README.md)."""
EXACT_TREES = 128
"""Longest tree whose plain products are always fp32."""
TREE_ATTENTION = "spin_ray_trees"
PADDED_LENGTH_MULTIPLE = 64
"""Like ``TARGETS_MULTIPLE``, for row lengths."""


class ResponseScorer(nn.Module):
    """The model and its head as one module, the root for FSDP2.

    The root gathers embeddings and head, which are used outside the model's ``forward``.
    """

    def __init__(self, model: Any, layout: Layout = "packed") -> None:
        super().__init__()
        self.model = model.eval()  # no dropout, ever
        self.layout = layout
        self._takes_spans = layout == "packed" and _attend_by_trees(model)

    def forward(self, batch: PackedBatch, *, by_token: bool = False) -> Float[Tensor, "segments_or_targets"]:
        """Returns log p of every response, or of every response token, in nats."""
        target_logps = self._packed(batch) if self.layout == "packed" else self._padded(batch)
        if by_token:
            return target_logps
        return response_logps(target_logps, batch.segment, batch.num_segments)

    def head(self) -> Head:
        """Returns the function from hidden states to logits."""
        return self.model.get_output_embeddings()

    def _packed(self, batch: PackedBatch) -> Float[Tensor, "targets"]:
        dtype = self.model.get_input_embeddings().weight.dtype
        spans = {"tree_spans": tree_spans(batch)} if self._takes_spans else {}
        output = self.model.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=additive_mask(visible(batch), dtype)[None, None],
            use_cache=False,
            **spans,
        )
        hidden = output.last_hidden_state[0]
        return _chunked_logps(self.head(), hidden, batch.predict_at, batch.target_ids)

    def _padded(self, batch: PackedBatch) -> Float[Tensor, "targets"]:
        """Calls the model once: FSDP2's ranks must make equally many calls."""
        input_ids, lengths = padded_rows(batch)
        attention_mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False).logits
        at = batch.segment * input_ids.shape[1] + batch.position_ids[batch.predict_at]
        return _chunked_logps(nn.Identity(), logits.flatten(0, 1), at, batch.target_ids)


def visible(batch: PackedBatch) -> Bool[Tensor, "tokens tokens"]:
    """Returns who sees whom, [query, key].

    A query sees itself and earlier tokens of its tree's prompt and its own response.
    Padding sees itself, as a row that sees nothing would be nan.
    """
    place = torch.arange(len(batch.tree), device=batch.tree.device)
    query, key = (slice(None), None), (None, slice(None))
    seen = (batch.tree[query] == batch.tree[key]) & (place[query] >= place[key])
    seen &= (batch.branch[key] == 0) | (batch.branch[query] == batch.branch[key])
    return (seen & (batch.tree >= 0)[query]) | (place[query] == place[key])


def additive_mask(seen: Bool[Tensor, "tokens tokens"], dtype: torch.dtype) -> Float[Tensor, "tokens tokens"]:
    """Returns 0 where seen, else -inf.

    Given booleans, SDPA would make and keep this tensor in every layer.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def tree_spans(batch: PackedBatch) -> tuple[tuple[int, int], ...]:
    """Returns [start, stop) of every tree and the padding."""
    starts = (batch.tree.diff(prepend=batch.tree.new_full((1,), -2)) != 0).nonzero().squeeze(1).tolist()
    return tuple(pairwise([*starts, len(batch.tree)]))


def attend_tree_by_tree(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens width"],
    attention_mask: Tensor | None,
    *,
    tree_spans: tuple[tuple[int, int], ...] | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "1 tokens heads width"], None]:
    """Attends on each diagonal block of the mask, as all else is -inf.

    Without ``tree_spans``, which some models lose, plain SDPA gives the same.
    """
    if tree_spans is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    sizes = [stop - start for start, stop in tree_spans]
    additive = attention_mask.dtype == query.dtype and settings.get("position_bias") is None
    dense = DENSE_TREES.get(query.dtype, 0) if additive and query.device.type == "cpu" else 0
    trees = zip(tree_spans, *(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for (start, stop), q, k, v in trees:
        mask = attention_mask[..., start:stop, start:stop]
        if stop - start <= dense:
            outputs.append(_attend_densely(q, k, v, mask, settings.get("scaling")))
        else:
            outputs.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0])
    return torch.cat(outputs, dim=1), None


def _attend_densely(
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens width"],
    mask: Float[Tensor, "1 1 tokens tokens"],
    scaling: float | None,
) -> Float[Tensor, "1 tokens heads width"]:
    """Returns softmax(QKᵀ · scaling + mask)V, one product per key head."""
    heads, tokens, width = query.shape[1:]
    kv_heads, dtype = key.shape[1], torch.float32 if query.shape[2] <= EXACT_TREES else query.dtype
    queries, keys, values = query.reshape(kv_heads, -1, width).to(dtype), key[0].to(dtype), value[0].to(dtype)
    seen = mask[0].to(dtype).repeat(1, heads // kv_heads, 1)
    scores = torch.baddbmm(seen, queries, keys.transpose(1, 2), alpha=scaling or width**-0.5)
    attended = torch.bmm(scores.softmax(dim=-1), values).to(query.dtype)
    return attended.view(1, heads, tokens, width).transpose(1, 2)


AttentionInterface.register(TREE_ATTENTION, attend_tree_by_tree)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)


def _attend_by_trees(model: Any) -> bool:
    """Makes the model attend tree by tree; returns True if it takes ``tree_spans``."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(TREE_ATTENTION)
    takes_more = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(model.get_decoder().forward).parameters.values()
    )
    return takes_more and model.config._attn_implementation == TREE_ATTENTION


def padded_rows(batch: PackedBatch) -> tuple[Int64[Tensor, "rows length"], Int64[Tensor, "rows"]]:
    """Returns responses with their prompts as right-padded rows, and the true lengths."""
    token = (batch.branch > 0).nonzero().squeeze(1)  # one for each target: both are in pack order
    tree, branch = (
        x.new_zeros(batch.num_segments).index_put((batch.segment,), x[token]) for x in (batch.tree, batch.branch)
    )
    member = (batch.tree == tree[:, None]) & ((batch.branch == 0) | (batch.branch == branch[:, None]))
    row, token = member.nonzero(as_tuple=True)
    if not batch.num_segments:
        return batch.input_ids[None, :PADDED_LENGTH_MULTIPLE], batch.input_ids.new_ones(1)
    lengths = member.sum(dim=1)
    columns = -(-int(lengths.max()) // PADDED_LENGTH_MULTIPLE) * PADDED_LENGTH_MULTIPLE
    rows = batch.input_ids.new_zeros(batch.num_segments, columns)
    return rows.index_put((row, batch.position_ids[token]), batch.input_ids[token]), lengths


def _chunked_logps(
    head: Head,
    hidden: Float[Tensor, "tokens width"],
    at: Int64[Tensor, "targets"],
    target_ids: Int64[Tensor, "targets"],
) -> Float[Tensor, "targets"]:
    """Returns log softmax(head(hidden[at]))[target_ids] in fp32; [targets, vocab] never exists whole.

    Without targets, an empty chunk still reaches every parameter: FSDP2's ranks would wait otherwise.
    """
    targets = len(at)
    fill = -targets % TARGETS_MULTIPLE
    at, target_ids = functional.pad(at, (0, fill)), functional.pad(target_ids, (0, fill))
    chunks = zip(at.split(TARGETS_PER_CHUNK), target_ids.split(TARGETS_PER_CHUNK), strict=True)
    logps = [
        checkpoint(_logps_of_chunk, head, hidden, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return torch.cat(logps)[:targets]


def _logps_of_chunk(head: Head, hidden: Tensor, at: Tensor, target_ids: Tensor) -> Tensor:
    logits = head(hidden[at]).float()
    return logits.gather(-1, target_ids[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
