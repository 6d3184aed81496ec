"""Step 1: the card, its memory, and the rate of its matrix products."""

import json
from collections.abc import Iterator

import torch

from gpu_steps.child import Context, Item
from gpu_steps.clock import seconds_of
from gpu_steps.rows import Measure
from gpu_steps.sizes import device_of, sheet_rate

LARGE = 8192


def card(context: Context) -> Iterator[Measure]:
    if context.tiny:
        yield Measure(id="compute capability", value=0, unit="", note="a CPU")
        return
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major + properties.minor / 10
    yield Measure(id="compute capability", value=capability, unit="", target=">= 8.0", note=properties.name)
    free, total = torch.cuda.mem_get_info()
    yield Measure(id="memory", value=total / 1e9, unit="GB", note=f"{free / 1e9:.1f} GB free")
    yield Measure(id="bf16", value=float(torch.cuda.is_bf16_supported()), unit="1 is yes", target=">= 1")


def products(context: Context) -> Iterator[Measure]:
    rate, sheet = measured_rate(context), sheet_rate(context)
    yield Measure(id=f"bf16 product of {LARGE}³", value=rate / 1e12, unit="TFLOP/s")
    if sheet:
        yield Measure(id="the same, share of the data sheet", value=rate / sheet, unit="")


def copies(context: Context) -> Iterator[Measure]:
    count = 2**20 if context.tiny else 2**30
    source = torch.ones(count, dtype=torch.bfloat16, device=device_of(context))
    target = torch.empty_like(source)
    spent = seconds_of(context, lambda: target.copy_(source), warm_up=1, times=3)
    yield Measure(id="copy within memory", value=2 * source.nbytes / spent / 1e9, unit="GB/s read and written")


def measured_rate(context: Context) -> float:
    """Returns FLOP/s of a large bf16 product on random data, measured once for all steps."""
    kept = context.work / "product.json"
    if not kept.exists():
        size = 128 if context.tiny else LARGE
        left, right = (torch.randn(size, size, device=device_of(context), dtype=torch.bfloat16) for _ in range(2))
        spent = seconds_of(context, lambda: left @ right, warm_up=3, times=10)
        kept.write_text(json.dumps(2 * size**3 / spent))
    return float(json.loads(kept.read_text()))


ITEMS: dict[str, Item] = {"card": card, "products": products, "copies": copies}
