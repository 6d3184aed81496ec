"""A Hugging Face causal LM as a scorer: pack in, log p(response | prompt) out.

Packed layout: one sequence, whose branches ``learner.attention`` keeps apart.
Padded layout, for models without such attention: each response with its prompt is a row.
"""

import inspect
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from spin_ray.learner.attention import ATTENTIONS, IMPLEMENTATION, Attention
from spin_ray.learner.attention.base import Window
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.decoder import decoder_of
from spin_ray.learner.head import Head, HeadReader, LogitTransform, target_logps
from spin_ray.learner.losses import response_logps

Layout = Literal["packed", "padded"]

PADDED_LENGTH_MULTIPLE = 64
"""Multiple to which rows are padded: oneDNN compiles kernels for each new shape."""


class ResponseScorer(nn.Module):
    """The model and its head as one module, the root for FSDP2.

    The root gathers embeddings and head, which are used outside the model's ``forward``.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout = "packed",
        attention: str | Attention | None = None,
        *,
        model_logits: bool = False,
    ) -> None:
        """Sets the model's attention.

        Args:
            attention: for packs one of ``ATTENTIONS`` (default: trees), for rows a name in transformers (default: the
                model's).
            model_logits: in rows, the model computes the logits of all positions, for unknown heads.
        """
        super().__init__()
        self.model = model.eval()  # no dropout, ever
        self.layout = layout
        self.fused_head = False
        self._model_logits = model_logits
        self._transform = LogitTransform.of(model.config.get_text_config())
        self._windows = attention_windows(model.config.get_text_config())
        if layout == "packed":
            attention = attention or "trees"
            self._attention = ATTENTIONS[attention] if isinstance(attention, str) else attention
            self._takes_plan = _attend_by_plan(model)
        elif attention is not None:
            model.set_attn_implementation(attention)

    def forward(self, batch: PackedBatch, *, by_token: bool = False, read: HeadReader | None = None) -> Any:
        """Returns log p of every response, or of every response token, in nats; or what ``read`` returns."""
        score = self._packed if self.layout == "packed" else self._padded
        found = score(batch, read or partial(target_logps, fused=self.fused_head))
        if by_token or read:
            return found
        return response_logps(found, batch.segment, batch.num_segments)

    def head(self) -> Head:
        """Returns the function from hidden states to logits."""
        return self.model.get_output_embeddings()

    def _packed(self, batch: PackedBatch, read: HeadReader) -> Any:
        embeddings = self.model.get_input_embeddings().weight
        device = batch.input_ids.device
        plan = self._attention.prepare(batch, self._windows, device, embeddings.dtype)
        # Any 4-D mask goes to the layers as it is; without one, transformers makes a dense mask from the positions.
        mask = torch.empty(1, 1, 0, 0, device=device) if plan.mask is None else plan.mask
        output = decoder_of(self.model)(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=mask,
            use_cache=False,
            **({"attention_plan": plan} if self._takes_plan else {}),
        )
        hidden = output.last_hidden_state[0]
        return read(self.head(), hidden, batch.predict_at, batch.target_ids, self._transform)

    def _padded(self, batch: PackedBatch, read: HeadReader) -> Any:
        """Calls the model once, as FSDP2's ranks must make equally many calls."""
        input_ids, lengths = padded_rows(batch)
        attention_mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        at = batch.segment * input_ids.shape[1] + batch.position_ids[batch.predict_at]
        rows = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
        if self._model_logits:
            logits = self.model(**rows).logits.flatten(0, 1)
            return read(nn.Identity(), logits, at, batch.target_ids, LogitTransform())
        hidden = decoder_of(self.model)(**rows).last_hidden_state.flatten(0, 1)
        return read(self.head(), hidden, at, batch.target_ids, self._transform)


def attention_windows(config: Any) -> tuple[Window, ...]:
    """Returns the window of every layer."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _attend_by_plan(model: Any) -> bool:
    """Makes the model attend by plans; returns True if its decoder passes them on."""
    if model.config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION)
    takes_more = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(decoder_of(model).forward).parameters.values()
    )
    return takes_more and model.config._attn_implementation == IMPLEMENTATION


def padded_rows(batch: PackedBatch) -> tuple[Int64[Tensor, "rows length"], Int64[Tensor, "rows"]]:
    """Returns each prompt + response as a right-padded row, and the true lengths."""
    token = (batch.branch > 0).nonzero().squeeze(1)  # response tokens, one per target, both in pack order
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
