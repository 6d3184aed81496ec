"""Comparison of ways to score a model with the model's own scores, on first layers and made-up packs."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spin_ray.errors import ModelError, first_line
from spin_ray.learner.attention import ATTENTIONS, AttentionPlan
from spin_ray.learner.attention.base import Window
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.decoder import decoder_of
from spin_ray.learner.loading import as_eager, first_layers
from spin_ray.learner.losses import segment_lengths
from spin_ray.learner.packing import build_pack
from spin_ray.learner.rope import rope_limit, switching
from spin_ray.learner.scoring import Layout, attention_windows, padded_rows

_SHAPES = [(4, 3, 2), (4, 3, 5), (2, 2, 3)]
"""Tokens of prompt, human and generated response in the short pack; the first two rows share a tree."""
_SCORE_BYTES = {"cpu": 2**31, "cuda": 2**32}
"""Memory of one layer's eager attention, in bytes; limits the long pack."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_LOOSE = 1e-3
"""Largest relative change of hidden states taken for rounding."""


class Probe:
    """The model's first layers and their own scores of a short and a long pack.

    Windows, chunks, sparse attention and rotary scaling show only in long sequences.
    On CPUs, fp32 is compared too, as bf16 rounding may hide errors.
    """

    def __init__(
        self, model: Any, max_length: int, device: torch.device, dtype: torch.dtype, reach: int | None = None
    ) -> None:
        """Scores the packs with the model's own forward pass.

        Args:
            reach: longest sequence, if ``max_length`` and memory allow it.

        Raises:
            ModelError: the model's own forward pass fails.
        """
        self._config = model.config.get_text_config()
        self._max_length = max_length
        self.device, self._dtype = device, dtype
        dtypes = list(dict.fromkeys([torch.float32, dtype] if device.type == "cpu" else [dtype]))
        stretch = 1 if device.type == "cpu" else min(40, max(1, max_length // 9))  # more than one block of a kernel
        vocabulary = self._config.vocab_size
        short = _made_up_pack(vocabulary, [tuple(length * stretch for length in shape) for shape in _SHAPES])
        # fp32 comes from the model's own weights, not from bf16: rounding cannot be undone.
        self._models = {kind: _first_layers_in(model, device, kind) for kind in {torch.float32, *dtypes}}
        self._reach = min(max_length, _affordable(self._config, device), reach or max_length)
        self._tries = [(short, kind) for kind in dtypes]
        if self._reach > 9 * stretch:
            self._tries.append((_long_pack(vocabulary, self._reach), dtypes[0]))
        try:
            self._own = {kind: as_eager(tried) for kind, tried in self._models.items()}
            self._expected = [
                {kind: self._logps_one_by_one(batch, kind) for kind in {torch.float32, tried}}
                for batch, tried in self._tries
            ]
        except Exception as error:
            what = f"its own forward pass fails ({type(error).__name__}: {first_line(error)})"
            raise ModelError(f"{type(model).__name__}: {what}") from error

    @torch.no_grad()
    def looks_ahead(self) -> str | None:
        """Returns why hidden states depend on later tokens, or None."""
        if (limit := rope_limit(self._config.to_dict())) and limit < self._max_length:
            return switching(limit)
        model = self._own[torch.float32]
        rows, lengths = padded_rows(self._tries[-1][0])
        row = rows[0, : int(lengths[0])].to(self.device)
        first = 4
        alone, within = (_hidden(model, ids[None])[0, :first] for ids in (row[:first], row))
        if (alone - within).abs().max() <= _LOOSE * alone.abs().max():
            return None
        return "its tokens see what follows them; SPIN needs a causal language model"

    def why_not(self, layout: Layout, attention: str, scorer_of: Callable[[Any], Any]) -> str | None:
        """Returns why the model cannot be scored in this way, or None."""
        if layout == "packed":
            if reason := _unpackable(self._config, self._max_length):
                return reason
            if reason := ATTENTIONS[attention].why_not(self.device, self._dtype):
                return reason
        if layout == "padded" and attention == "sdpa" and _softcap(self._config):
            return "SDPA would ignore attn_logit_softcapping"
        for (batch, dtype), expected in zip(self._tries, self._expected, strict=True):
            if reason := self._differs(scorer_of, layout, batch, dtype, expected):
                return reason
        if layout == "packed" and self.device.type == "cuda":
            return self._has_no_gradients(scorer_of)
        return None

    def _has_no_gradients(self, scorer_of: Callable[[Any], Any]) -> str | None:
        """Returns why gradients cannot be computed on this card, or None: kernels are built when first called.

        Stages that only score ask, too, as they must attend in the way of training.
        """
        model, embedded = self._models[self._dtype], []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        hook = model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                torch.autograd.grad(scorer_of(model)(self._tries[0][0].to(self.device)).sum(), embedded)
        except Exception as error:
            return f"its gradients cannot be computed here ({type(error).__name__}: {first_line(error)})"
        finally:
            hook.remove()
        return None

    @torch.no_grad()
    def _differs(
        self,
        scorer_of: Callable[[Any], Any],
        layout: Layout,
        batch: PackedBatch,
        dtype: torch.dtype,
        own: dict[torch.dtype, Tensor],
    ) -> str | None:
        try:
            scorer = scorer_of(self._models[dtype])
            watched = _Watched(scorer._attention) if layout == "packed" else None
            if watched is not None:
                scorer._attention = watched
            found = scorer(batch.to(self.device)).cpu()
        except Exception as error:
            what = "does not take a 4-D mask" if layout == "packed" else "does not score rows"
            return f"it {what} ({type(error).__name__}: {first_line(error)})"
        expected = own[torch.float32]
        allowed = 1e-4 + 1e-5 * expected.abs()
        if dtype != torch.float32:
            rounding = 4 * (own[dtype] - expected).abs().max()
            allowed = allowed + rounding + 0.02 * segment_lengths(batch)
        if not ((found - expected).abs() <= allowed).all():
            return (
                f"{layout} log-probabilities differ from those of eager attention, one response at a time, "
                f"by {(found - expected).abs().max():.2g} nats"
            )
        return watched.mismatch(self._models[dtype].config.get_text_config(), self._max_length) if watched else None

    @torch.no_grad()
    def _logps_one_by_one(self, batch: PackedBatch, dtype: torch.dtype) -> Float[Tensor, "segments"]:
        """Scores each response alone: eager attention, no mask, no padding."""
        model, rows, sums = self._own[dtype], padded_rows(batch), []
        takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        for segment, (row, length) in enumerate(zip(rows[0], rows[1].tolist(), strict=True)):
            responded = int((batch.segment == segment).sum())
            row = row[:length].to(self.device)
            last = {"logits_to_keep": responded + 1} if takes_last else {}  # the head costs most in a small model
            logps = model(input_ids=row[None], use_cache=False, **last).logits[0].float().log_softmax(-1)
            sums.append(logps[-responded - 1 : -1].gather(-1, row[-responded:, None]).sum())
        return torch.stack(sums).cpu()


class _Watched:
    """An attention that records window and soft-cap of each call, as short packs may not show a wrong one."""

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
        """Returns how recorded windows and soft-caps differ from the config, or None."""
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


def _unpackable(config: Any, max_length: int) -> str | None:
    """Returns a setting that breaks packs longer than the probe's, or None."""
    if "chunked_attention" in (getattr(config, "layer_types", None) or ["chunked_attention"]):
        chunk = getattr(config, "attention_chunk_size", None)
        if chunk and chunk < max_length:
            return f"it attends within chunks of {chunk} tokens, shorter than max_length {max_length}"
    if getattr(config, "attn_temperature_tuning", False):
        return "its attention's temperature counts places in the pack, not positions (attn_temperature_tuning)"
    return None


def _softcap(config: Any) -> float | None:
    return getattr(config, "attn_logit_softcapping", None)


def _hidden(model: Any, ids: Int64[Tensor, "1 tokens"]) -> Float[Tensor, "1 tokens width"]:
    output = decoder_of(model)(input_ids=ids, use_cache=False)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _affordable(config: Any, device: torch.device) -> int:
    # Scores, softmax and mask of the longest sequence, in fp32.
    heads = next((heads for name in _HEADS if isinstance(heads := getattr(config, name, None), int)), 32)
    return math.isqrt(_SCORE_BYTES.get(device.type, _SCORE_BYTES["cuda"]) // (12 * heads))


def _first_layers_in(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies the first layers; parameters share memory if unchanged, buffers keep their precision as under FSDP2."""
    copy = first_layers(model).to(device)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return copy.eval()


def _long_pack(vocab_size: int, reach: int) -> PackedBatch:
    real = min(16, reach // 2)
    prompt = reach - real
    return _made_up_pack(vocab_size, [(prompt, real, real // 2 + 1), (prompt, real, 2), (2, 2, 3)])


def _made_up_pack(vocab_size: int, shapes: Sequence[tuple[int, ...]]) -> PackedBatch:
    ids = ((7 * i + 3) % vocab_size for i in range(sum(map(sum, shapes))))
    first, second, third = ([[next(ids) for _ in range(length)] for length in shape] for shape in shapes)
    second[:2] = first[:2]
    columns = zip(("prompt_ids", "real_ids", "generated_ids"), zip(first, second, third, strict=True), strict=True)
    table = pa.table({name: pa.array(values, pa.list_(pa.int32())) for name, values in columns})
    length = sum(map(sum, shapes)) - sum(shapes[1][:2])
    return build_pack(((0, 1), (2,)), table, pack_length=length + 2, pad_id=0)
