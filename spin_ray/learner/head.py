"""Log-probabilities of targets from hidden states, without ever holding all [targets, vocab] logits."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spin_ray.learner.sizes import ROWS_PER_CHUNK

Head = Callable[[Tensor], Tensor]

COMPILER = "inductor"
TARGETS_MULTIPLE = 64
"""Multiple to which targets are padded: oneDNN compiles kernels for each new shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """softcap · tanh(scale · logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """Reads the settings of Gemma, Cohere, Falcon H1 and Granite; the layout probe detects other transforms."""
        scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
        return cls(
            scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Returns d transformed / d logits."""
        return self.scale if self.softcap is None else self.scale * (1 - (transformed / self.softcap) ** 2)


HeadReader = Callable[[Head, Tensor, Tensor, Tensor, LogitTransform], Any]
"""Function of head, hidden states, targets' places in them, targets' ids and logit transform."""


def target_logps(
    head: Head,
    hidden: Float[Tensor, "tokens width"],
    at: Int64[Tensor, "targets"],
    target_ids: Int64[Tensor, "targets"],
    transform: LogitTransform,
    *,
    rows: int | None = None,
    fused: bool = False,
) -> Float[Tensor, "targets"]:
    """Returns log softmax(transform(head(hidden[at])))[target_ids] in fp32 (fp64 for fp64).

    ``fused`` compiles the softmax of a plain head and its gradient.
    Without targets, padding still reaches every parameter, else FSDP2's other ranks would wait.
    """
    targets = len(at)
    at, target_ids = padded(at), padded(target_ids)
    rows = rows or rows_per_chunk(hidden)
    if type(head) is nn.Linear:
        logps = _TargetLogps.apply(hidden[at], head.weight, head.bias, target_ids, transform, rows, fused)
        return cast(Tensor, logps)[:targets]
    chunks = zip(at.split(rows), target_ids.split(rows), strict=True)
    logps = [
        checkpoint(_of_chunk, head, hidden, *chunk, transform, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return torch.cat(logps)[:targets]


def padded(values: Tensor) -> Tensor:
    """Pads values of targets to ``TARGETS_MULTIPLE``, also if there are none: every rank uses the head."""
    fill = -len(values) % TARGETS_MULTIPLE or (0 if len(values) else TARGETS_MULTIPLE)
    return functional.pad(values, (0, 0) * (values.dim() - 1) + (0, fill))


def rows_per_chunk(hidden: Tensor) -> int:
    return ROWS_PER_CHUNK.get(hidden.device.type, ROWS_PER_CHUNK["cuda"])


def upcast(logits: Tensor) -> Tensor:
    """Returns logits in fp32 (fp64 for fp64)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _of_chunk(head: Head, hidden: Tensor, at: Tensor, target_ids: Tensor, transform: LogitTransform) -> Tensor:
    return _pick(head(hidden[at]), target_ids, transform)[0]


def _pick(logits: Tensor, target_ids: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    logits = transform(upcast(logits))
    total = logits.logsumexp(dim=-1)
    return logits.gather(-1, target_ids[:, None]).squeeze(-1) - total, total


def _change(logits: Tensor, target_ids: Tensor, total: Tensor, gradient: Tensor, transform: LogitTransform) -> Tensor:
    transformed = transform(upcast(logits))
    slope = transform.slope(transformed)
    change = transformed.sub_(total[:, None]).exp_().mul_(-gradient[:, None])
    change.scatter_add_(1, target_ids[:, None], gradient[:, None])
    return change.mul_(slope).to(logits.dtype)


def _change_in_one_pass(
    logits: Tensor, target_ids: Tensor, total: Tensor, gradient: Tensor, transform: LogitTransform
) -> Tensor:
    """Computes ``_change`` in a form that compiles to one kernel."""
    transformed = transform(upcast(logits))
    change = (transformed - total[:, None]).exp() * -gradient[:, None]
    is_target = torch.arange(logits.shape[1], device=logits.device) == target_ids[:, None]
    change = torch.where(is_target, change + gradient[:, None], change)
    return (change * transform.slope(transformed)).to(logits.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles once for all row counts, so that scoring and training run one kernel."""
    compiled = torch.compile(function, fullgraph=True, backend=COMPILER)

    def call(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled(*arguments)

    return call


class _TargetLogps(torch.autograd.Function):
    """``target_logps`` of a plain head; backward computes each chunk's logits again.

    With dp the gradient of a target's log p, and s the slope of the transform:
    d logits = dp (onehot(target) − softmax) s, d hidden = d logits · W, dW = Σ d logitsᵀ · hidden.
    dW is summed in fp32, also for bf16 weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        transform: LogitTransform,
        rows: int,
        fused: bool,
    ) -> Tensor:
        pick = _compiled(_pick) if fused else _pick
        parts = [
            pick(functional.linear(part, weight, bias), ids, transform)
            for part, ids in zip(hidden.split(rows), target_ids.split(rows), strict=True)
        ]
        logps, totals = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, target_ids, totals)
        ctx.transform, ctx.rows, ctx.fused = transform, rows, fused
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, totals = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(weight.dtype, torch.float32)
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        change_of = _compiled(_change_in_one_pass) if ctx.fused else _change
        pieces = (x.split(ctx.rows) for x in (hidden, target_ids, totals, gradients[0]))
        for number, (part, ids, total, gradient) in enumerate(zip(*pieces, strict=True)):
            change = change_of(functional.linear(part, weight, bias), ids, total, gradient, ctx.transform)
            if of_hidden is not None:
                first = number * ctx.rows
                torch.mm(change, weight, out=of_hidden[first : first + len(part)])
            if of_weight is not None and of_weight.dtype == change.dtype:
                of_weight.addmm_(change.T, part)
            elif of_weight is not None:
                of_weight.add_(change.T @ part)
            if of_bias is not None:
                of_bias.add_(change.sum(0))
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip
