"""The choice of layout and attention for scoring, by comparison with the model's own scores."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spin_ray.errors import ModelError
from spin_ray.learner.attention import candidates
from spin_ray.learner.layout_probe import Probe
from spin_ray.learner.scoring import Layout, ResponseScorer

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to score a model."""

    layout: Layout
    attention: str
    """Name in ``ATTENTIONS`` for packs, in transformers for rows."""
    model_logits: bool = False
    """True: the model computes the logits, as its head is unknown."""

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
    """Returns the first choice whose scores equal the model's own (``Probe``).

    Args:
        model: an unsharded model in fp32; it stays as it is.

    Raises:
        ModelError: no choice gives right numbers, or tokens see what follows them.
    """
    choice, reasons = try_layouts(model, wanted, Probe(model, max_length, device, dtype))
    if choice.layout == "padded" and wanted == "auto":
        logger.warning(
            "%s: %s; scoring responses in the padded layout, which costs 2-4 times as much",
            type(model).__name__,
            "; ".join(reasons),
        )
    elif reasons:
        logger.warning("%s: %s; scoring %s", type(model).__name__, "; ".join(reasons), choice)
    return choice


def try_layouts(model: Any, wanted: Literal["auto", "packed", "padded"], probe: Probe) -> tuple[Choice, list[str]]:
    """Returns the first choice that passes the probe, and what is wrong with those before it.

    Raises:
        ModelError: no choice passes, or tokens see what follows them.
    """
    if reason := probe.looks_ahead():
        raise ModelError(f"{type(model).__name__}: {reason}")
    reasons: list[str] = []
    for choice in _choices(wanted, probe.device):
        reason = probe.why_not(choice.layout, choice.attention, choice.scorer)
        if reason is None:
            return choice, reasons
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
