"""The choice of layout and attention for scoring, by comparing with the model's own reference attention."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from spin_ray.errors import ModelError
from spin_ray.learner.attention import ATTENTIONS, AttentionPlan, candidates
from spin_ray.learner.attention.base import Window
from spin_ray.learner.attention.capability import too_old
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.loading import first_layers
from spin_ray.learner.packing import build_pack
from spin_ray.learner.scoring import Layout, ResponseScorer, attention_windows, padded_rows

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a model is scored."""

    layout: Layout
    attention: str
    """Name in ``ATTENTIONS`` for packs, in transformers for rows."""
    model_logits: bool = False
    """True: the model makes the logits of all positions, as its head is not known."""

    def scorer(self, model: Any, kind: type[ResponseScorer] = ResponseScorer) -> Any:
        return kind(model, self.layout, self.attention, model_logits=self.model_logits)

    def __str__(self) -> str:
        return f"{self.layout} ({self.attention}{', logits of the model' if self.model_logits else ''})"


def choose_layout(
    model: Any,
    wanted: Literal["auto", "packed", "padded"],
    *,
    max_length: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """Returns the first way whose scores are the model's own, tried on its first layers with a made-up pack.

    The yardstick is transformers' eager attention, one response at a time.

    Args:
        model: an unsharded model in fp32; it stays as it is.
        device: where training computes.
        dtype: precision of training's computation.

    Raises:
        ModelError: no way of the wanted layout gives right numbers, or the card has no bf16.
    """
    if dtype == torch.bfloat16 and (reason := too_old(device, "train.precision: bf16")):
        raise ModelError(f"{reason}; set train.precision: fp32")
    probe = _Probe(model, max_length, device, dtype)
    reasons: list[str] = []
    for choice in _choices(wanted, device):
        reason = probe.why_not(choice)
        if reason is None:
            if choice.layout == "padded" and wanted == "auto":
                logger.warning(
                    "%s: %s; scoring responses in the padded layout, which costs 2-4 times as much",
                    type(model).__name__,
                    "; ".join(reasons),
                )
            elif reasons:
                logger.warning("%s: %s; scoring %s", type(model).__name__, "; ".join(reasons), choice)
            return choice
        reasons.append(f"{choice}: {reason}")
    cure = "; use auto or padded" if wanted == "packed" else ""
    raise ModelError(f"model.attention: {wanted} does not work for {type(model).__name__}: {'; '.join(reasons)}{cure}")


def _choices(wanted: str, device: torch.device) -> Iterator[Choice]:
    if wanted != "padded":
        for name in candidates(device):
            yield Choice(layout="packed", attention=name)
    if wanted != "packed":
        for model_logits in (False, True):
            for name in ("sdpa", "eager"):
                yield Choice(layout="padded", attention=name, model_logits=model_logits)


class _Probe:
    """The model's first layers and their own scores of a made-up pack.

    On CPUs fp32 is compared too: it shows what the rounding of bf16 hides.
    """

    def __init__(self, model: Any, max_length: int, device: torch.device, dtype: torch.dtype) -> None:
        self._config = model.config.get_text_config()
        self._max_length = max_length
        self._device, self._dtype = device, dtype
        self._dtypes = list(dict.fromkeys([torch.float32, dtype] if device.type == "cpu" else [dtype]))
        stretch = 1 if device.type == "cpu" else min(40, max(1, max_length // 9))  # more than one block of a kernel
        self._batch = _made_up_pack(self._config.vocab_size, stretch)
        # Two copies of few layers: rounding the first to bf16 cannot be undone.
        self._models = {kind: _first_layers_in(model, device, kind) for kind in {torch.float32, *self._dtypes}}
        self._expected = {kind: self._logps_one_by_one(kind) for kind in self._models}

    def why_not(self, choice: Choice) -> str | None:
        """Returns why the model cannot be scored so, or None."""
        if choice.layout == "packed":
            if chunk := _chunk(self._config, self._max_length):
                return f"it attends within chunks of {chunk} tokens, shorter than max_length {self._max_length}"
            if reason := ATTENTIONS[choice.attention].why_not(self._device, self._dtype):
                return reason
        if choice.layout == "padded" and choice.attention == "sdpa" and _softcap(self._config):
            return "SDPA would ignore attn_logit_softcapping"
        for dtype in self._dtypes:
            if reason := self._differs(choice, dtype):
                return reason
        return None

    @torch.no_grad()
    def _differs(self, choice: Choice, dtype: torch.dtype) -> str | None:
        try:
            scorer = choice.scorer(self._models[dtype])
            watched = _Watched(scorer._attention) if choice.layout == "packed" else None
            if watched is not None:
                scorer._attention = watched
            found = scorer(self._batch.to(self._device)).cpu()
        except Exception as error:
            what = "does not take a 4-D mask" if choice.layout == "packed" else "does not score rows"
            return f"it {what} ({type(error).__name__}: {error})"
        expected = self._expected[torch.float32]
        allowed = 1e-4 + 1e-5 * expected.abs()
        if dtype != torch.float32:
            rounding = 4 * (self._expected[dtype] - expected).abs().max()
            allowed = allowed + rounding + 0.02 * _response_lengths(self._batch)
        if not ((found - expected).abs() <= allowed).all():
            return (
                f"{choice.layout} log-probabilities differ from those of eager attention, one response at a time, "
                f"by {(found - expected).abs().max():.2g} nats"
            )
        return watched.mismatch(self._models[dtype].config.get_text_config(), self._max_length) if watched else None

    @torch.no_grad()
    def _logps_one_by_one(self, dtype: torch.dtype) -> Float[Tensor, "segments"]:
        """Returns the model's own scores: transformers' forward, eager attention, no mask, no padding."""
        model, rows, sums = self._models[dtype], padded_rows(self._batch), []
        model.set_attn_implementation("eager")
        for segment, (row, length) in enumerate(zip(rows[0], rows[1].tolist(), strict=True)):
            responded = int((self._batch.segment == segment).sum())
            row = row[:length].to(self._device)
            logps = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
            sums.append(logps[:-1].gather(-1, row[1:, None])[-responded:].sum())
        return torch.stack(sums).cpu()


class _Watched:
    """An attention that notes window and soft-capping of each layer's call."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self.calls: list[tuple[Window, float | None]] = []

    def prepare(self, batch: PackedBatch, windows: Sequence[Window], *place: Any) -> AttentionPlan:
        self._plan = self._attention.prepare(batch, windows, *place)
        self.mask = self._plan.mask
        return self

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        self.calls.append((settings["window"], settings["softcap"]))
        return self._plan.attend(query, key, value, **settings)

    def mismatch(self, config: Any, max_length: int) -> str | None:
        """Returns what the layers do not tell their attention; the made-up pack may be too short to show it."""
        told, wanted = (
            [window if window and window < max_length else None for window in windows]
            for windows in ((window for window, _ in self.calls), attention_windows(config))
        )
        if told != wanted and any(told + wanted):
            return f"its layers have attention windows of {wanted} tokens, and tell their attention of {told}"
        cap = _softcap(config)
        if any(softcap != cap for _, softcap in self.calls) or (cap and not self.calls):
            return "its layers do not tell their attention of attn_logit_softcapping"
        return None


def _softcap(config: Any) -> float | None:
    return getattr(config, "attn_logit_softcapping", None)


def _chunk(config: Any, max_length: int) -> int | None:
    """Returns the size of chunks that attention stays within, if max_length is longer."""
    if "chunked_attention" not in (getattr(config, "layer_types", None) or ["chunked_attention"]):
        return None
    chunk = getattr(config, "attention_chunk_size", None)
    return chunk if chunk and chunk < max_length else None


def _first_layers_in(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns a copy; buffers keep their precision, as under FSDP2."""
    copy = first_layers(model).to(device)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return copy.eval()


def _response_lengths(batch: PackedBatch) -> Float[Tensor, "segments"]:
    return torch.bincount(batch.segment, minlength=batch.num_segments).float()


def _made_up_pack(vocab_size: int, stretch: int) -> PackedBatch:
    ids = iter((7 * i + 3) % vocab_size for i in range(1000 * stretch))
    shapes = [(4, 3, 2), (4, 3, 5), (2, 2, 3)]  # prompt, real, generated
    first, second, third = ([[next(ids) for _ in range(length * stretch)] for length in shape] for shape in shapes)
    second[:2] = first[:2]
    columns = zip(("prompt_ids", "real_ids", "generated_ids"), zip(first, second, third, strict=True), strict=True)
    table = pa.table({name: pa.array(values, pa.list_(pa.int32())) for name, values in columns})
    return build_pack(((0, 1), (2,)), table, pack_length=24 * stretch, pad_id=0)
