"""Step 3: milliseconds and errors of each way to attend within packs, forward and backward of one layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_steps.child import Context, Item
from gpu_steps.clock import seconds_of
from gpu_steps.rows import Measure
from gpu_steps.sizes import CHAT, LONG, SHORT, device_of, pairs_of, shape_of, sizes_of, table_of
from spin_ray.learner.attention import ATTENTIONS
from spin_ray.learner.packing import build_pack, plan_epoch
from spin_ray.learner.step import pair_lengths


class Loop:
    """The former attention: SDPA on each tree with its part of a dense mask."""

    name = "loop"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, batch: Any, windows: Any, device: torch.device, dtype: torch.dtype) -> "LoopPlan":
        from spin_ray.learner.attention.dense import additive_mask
        from spin_ray.learner.attention.rule import visible
        from spin_ray.learner.attention.trees import tree_spans

        return LoopPlan(tree_spans(batch), additive_mask(visible(batch.to(device)), dtype)[None, None])


@dataclass(frozen=True)
class LoopPlan:
    spans: tuple[tuple[int, int], ...]
    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, **_: Any) -> Tensor:
        outputs = []
        for start, stop in self.spans:
            part = slice(start, stop)
            states = (x[:, :, part] for x in (query, key, value))
            mask = self.mask[..., part, part].contiguous()  # a slice at no multiple of 8 faults in some kernels
            attended = scaled_dot_product_attention(*states, attn_mask=mask, scale=scaling, enable_gqa=True)
            outputs.append(attended.transpose(1, 2))
        return torch.cat(outputs, dim=1)


def way(name: str, model: str, context: Context) -> Iterator[Measure]:
    device = device_of(context)
    found = ({"loop": Loop()} | ATTENTIONS)[name]
    dtype = torch.float32 if context.tiny and name != "varlen" else torch.bfloat16
    if why := found.why_not(device, dtype):
        raise NotImplementedError(why)
    for length in sizes_of(context).pack_lengths:
        for lengths in (CHAT, LONG, SHORT):
            case = f"{name}, {model} heads, pack of {length}, {lengths}"
            try:
                yield from _measured(found, case, context, model, length, lengths, dtype)
            except Exception as error:  # other packs may do
                if not isinstance(error, (RuntimeError, NotImplementedError)) or "CUDA error" in str(error):
                    raise
                yield Measure(id=f"{case}: time", value=None, unit="failed", note=str(error).splitlines()[0][:200])


def _measured(
    found: Any, case: str, context: Context, model: str, length: int, lengths: str, dtype: torch.dtype
) -> Iterator[Measure]:
    device, shape = device_of(context), shape_of(context, model)
    batch = full_pack(context, length, lengths)
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape["hidden_size"] // heads
    torch.manual_seed(0)
    states = [torch.randn(1, count, length, width, device=device, dtype=dtype) for count in (heads, kv_heads, kv_heads)]
    for state in states:
        state.requires_grad_()
    plan = found.prepare(batch, [None], device, dtype)
    attend = partial(plan.attend, scaling=width**-0.5, window=None, softcap=None, sinks=None)
    useful = batch.num_useful_tokens
    upstream = torch.randn(1, length, heads, width, device=device, dtype=dtype)
    upstream[:, useful:] = 0

    def once() -> Tensor:
        for state in states:
            state.grad = None
        output = attend(*states)
        output.backward(upstream)
        return output

    spent = seconds_of(context, once, warm_up=2, times=3)
    yield Measure(id=f"{case}: time", value=1e3 * spent, unit="ms forward and backward, a layer")
    made = seconds_of(context, lambda: found.prepare(batch, [None], device, dtype), warm_up=1, times=3)
    yield Measure(id=f"{case}: plan", value=1e3 * made, unit="ms, once a pack")
    if length == sizes_of(context).pack_lengths[0]:
        output = once().detach()
        expected, gradients = one_by_one(batch, [state.detach() for state in states], upstream)
        pairs = [(output[:, :useful], expected[:, :useful]), *zip([x.grad for x in states], gradients, strict=True)]
        for what, (mine, truth) in zip(("output", "dQ", "dK", "dV"), pairs, strict=True):
            error = float((mine.double() - truth).norm() / truth.norm())
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            yield Measure(id=f"{case}: error of {what}", value=error, unit="relative", target=f"<= {limit:g}")


def full_pack(context: Context, length: int, lengths: str) -> Any:
    """Returns a pack as full as ``lengths`` allow."""
    rows = pairs_of(context, lengths, count=max(4, 2 * length // 40))
    table = table_of(rows)
    total, kept = 0, 0
    for row in rows:
        total += sum(map(len, row.values()))
        if total > length:
            break
        kept += 1
    parts = table.slice(0, max(1, kept))
    (step,) = plan_epoch(
        pair_lengths([parts]), pack_length=length, global_batch_pairs=parts.num_rows, seed=0, epoch=0, ranks=1
    )
    return build_pack(step.packs[0], parts, pack_length=length, pad_id=0)


def one_by_one(batch: Any, states: list[Tensor], upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns output and gradients in fp64, by causal SDPA on each prompt and each response after its prompt."""
    query, key, value = (state.double().requires_grad_() for state in states)
    tree, branch = batch.tree.to(query.device), batch.branch.to(query.device)
    output = torch.zeros_like(upstream, dtype=torch.float64)
    loss = output.new_zeros(())
    for number in range(int(tree.max()) + 1):
        prompt = ((tree == number) & (branch == 0)).nonzero().squeeze(1)
        for response in range(int(branch[tree == number].max()) + 1):
            own = ((tree == number) & (branch == response)).nonzero().squeeze(1)
            places = torch.cat([prompt, own]) if response else prompt
            parts = (x[:, :, places] for x in (query, key, value))
            attended = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2)
            attended = attended[:, -len(own) :] if response else attended
            output[:, own] = attended.detach()
            loss = loss + (attended * upstream[:, own].double()).sum()
    return output, list(torch.autograd.grad(loss, (query, key, value)))


WAYS = ("flex", "varlen", "loop", "dense")
ITEMS: dict[str, Item] = {
    f"{name}, {model} heads": partial(way, name, model) for name in WAYS for model in ("1.5B", "7B")
}
