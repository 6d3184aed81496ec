"""Step 5: an optimizer step of 1.5B parameters: speed after each change, and where the time goes."""

from collections.abc import Iterator
from functools import partial

import torch

from gpu_steps.child import Context, Item
from gpu_steps.clock import peak_gb, seconds_of
from gpu_steps.learner import BEST, Learner, Variant, as_variant, group_of, one_rank, variants
from gpu_steps.machine import measured_rate
from gpu_steps.rows import Measure
from gpu_steps.sizes import (
    CHAT,
    LONG,
    device_of,
    model_folder,
    model_shape,
    needed_of,
    pairs_of,
    sheet_rate,
    sizes_of,
)

MODEL = "1.5B"
ATTENTION_WORDS = ("attention", "flash", "flex", "fmha", "sdpa", "varlen")


def speed(variant: Variant, lengths: str, context: Context) -> Iterator[Measure]:
    rate, sizes = measured_rate(context), sizes_of(context)
    name = f"{MODEL}, {lengths}, {variant.name}"
    with one_rank(group_of(context)), as_variant(variant):
        rows = pairs_of(context, lengths, count=sizes.pairs)
        learner = Learner(context, model_folder(context, MODEL), rows, per_step=len(rows), variant=variant)
        learner.score()
        times = (sizes.warm_up, sizes.steps) if variant == BEST else (1, 2)
        spent = seconds_of(context, learner.step, warm_up=times[0], times=times[1])
        yield Measure(id=f"{name}: training", value=len(rows) / spent, unit="pairs/s")
        yield from _shares(context, name, "training", rows, spent, rate, is_best=variant == BEST)
        yield Measure(id=f"{name}: peak memory", value=peak_gb(context), unit="GB")
        if variant != BEST:
            return
        scoring = seconds_of(context, learner.score, warm_up=1, times=2)
        yield Measure(id=f"{name}: scoring", value=len(rows) / scoring, unit="pairs/s")
        yield from _shares(context, name, "scoring", rows, scoring, rate, is_best=False)
        if lengths == CHAT:
            yield from _profile(context, name, learner)


def _shares(
    context: Context, name: str, stage: str, rows: list, spent: float, rate: float, *, is_best: bool
) -> Iterator[Measure]:
    """Yields MFU: FLOPs that the model needs over FLOPs that the card could have done in that time."""
    needed = needed_of(model_shape(context, MODEL), rows, backward=stage == "training") / spent
    target = ">= 0.5" if is_best else ""
    yield Measure(id=f"{name}: {stage}, MFU of measured products", value=needed / rate, unit="", target=target)
    if sheet := sheet_rate(context):
        target = ">= 0.4" if is_best else ""
        yield Measure(id=f"{name}: {stage}, MFU of the data sheet", value=needed / sheet, unit="", target=target)


def _profile(context: Context, name: str, learner: Learner) -> Iterator[Measure]:
    from torch.profiler import ProfilerActivity, profile

    on_card = device_of(context).type == "cuda"
    # On a card its kernels alone: to note the host's calls, too, would make gaps.
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as taken:
        learner.step()
        if on_card:
            torch.cuda.synchronize()
    kernels = [
        (event.name.lower(), event.time_range.start, event.time_range.end)
        for event in taken.events()
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_card
        if not (on_card and event.is_user_annotation)  # FSDP's span the gaps between its kernels
    ]
    busy = covered([(start, end) for _, start, end in kernels])
    attending = covered([span for kernel, *span in kernels if any(word in kernel for word in ATTENTION_WORDS)])
    whole = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
    yield Measure(id=f"{name}: attention's share of a step", value=attending / whole, unit="", target="<= 0.08")
    yield Measure(id=f"{name}: gaps, the card waits", value=1 - busy / whole, unit="of a step", target="<= 0.03")


def covered(spans: list) -> float:
    """Returns the time in which at least one span is open."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(map(tuple, spans)):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


ITEMS: dict[str, Item] = {
    f"best, {CHAT}": partial(speed, BEST, CHAT),
    f"best, {LONG}": partial(speed, BEST, LONG),
} | {variant.name: partial(speed, variant, CHAT) for variant in variants()[:-1]}
