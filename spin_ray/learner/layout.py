"""The choice of layout for scoring packs."""

import logging
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from spin_ray.errors import ModelError
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.packing import build_pack
from spin_ray.learner.scoring import Layout, ResponseScorer, padded_rows

logger = logging.getLogger(__name__)


def choose_layout(model: Any, wanted: Literal["auto", "packed", "padded"], *, max_length: int) -> Layout:
    """Decides ``auto`` by scoring a made-up pack both ways; needs an unsharded model in fp32.

    Raises:
        ModelError: ``packed`` would give wrong numbers.
    """
    if wanted == "padded":
        return "padded"
    reason = _why_not_packed(model, max_length)
    if reason is None:
        return "packed"
    if wanted == "packed":
        raise ModelError(
            f"model.attention: packed does not work for {type(model).__name__}: {reason}; use auto or padded"
        )
    logger.warning(
        "%s: %s; scoring responses in the padded layout, which costs 2-4 times as much", type(model).__name__, reason
    )
    return "padded"


def _why_not_packed(model: Any, max_length: int) -> str | None:
    window = _attention_window(model.config.get_text_config())
    if window is not None and window < max_length:
        return f"its attention window of {window} tokens is shorter than max_length {max_length}"
    batch = _made_up_pack(model.config.get_text_config().vocab_size).to(model.device)
    with torch.no_grad():
        expected = _logps_one_by_one(model, batch)
        try:
            found = ResponseScorer(model, "packed")(batch)
        except Exception as error:
            return f"it does not take a 4-D mask ({type(error).__name__}: {error})"
    if torch.allclose(found, expected, rtol=1e-5, atol=1e-4):
        return None
    return f"packed log-probabilities differ from unpacked ones by {(found - expected).abs().max():.2g} nats"


def _attention_window(config: Any) -> int | None:
    """Returns the shortest reach of local attention, which 4-D masks override."""
    kinds = getattr(config, "layer_types", None)
    windows = [
        getattr(config, field, None)
        for field, kind in [("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")]
        if kinds is None or kind in kinds
    ]
    return min((window for window in windows if window), default=None)


def _made_up_pack(vocab_size: int) -> PackedBatch:
    ids = iter((7 * i + 3) % vocab_size for i in range(1000))
    shapes = [(4, 3, 2), (4, 3, 5), (2, 2, 3)]  # prompt, real, generated
    first, second, third = ([[next(ids) for _ in range(length)] for length in shape] for shape in shapes)
    second[:2] = first[:2]
    columns = zip(("prompt_ids", "real_ids", "generated_ids"), zip(first, second, third, strict=True), strict=True)
    table = pa.table({name: pa.array(values, pa.list_(pa.int32())) for name, values in columns})
    return build_pack(((0, 1), (2,)), table, pack_length=24, pad_id=0)


def _logps_one_by_one(model: Any, batch: PackedBatch) -> Float[Tensor, "segments"]:
    rows, lengths = padded_rows(batch)
    sums = []
    for segment, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        responded = int((batch.segment == segment).sum())
        logps = model(input_ids=row[None, :length], use_cache=False).logits[0].float().log_softmax(-1)
        sums.append(logps[:-1].gather(-1, row[1:length, None])[-responded:].sum())
    return torch.stack(sums)
