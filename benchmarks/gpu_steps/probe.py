"""Step 2: which SDPA kernels take a mask sliced at no multiple of 8, and does the layout probe choose packs?"""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu_steps.child import Context, Item
from gpu_steps.rows import Measure
from gpu_steps.sizes import device_of, model_folder

START, STOP = 3, 90
"""Span of a tree within a pack; no end is a multiple of 8."""


def kernel(backend: SDPBackend, context: Context) -> Iterator[Measure]:
    """Yields the kernel's largest error beside fp64; the item fails where the kernel refuses."""
    torch.manual_seed(0)
    device, tokens = device_of(context), STOP - START
    states = [torch.randn(1, 4, tokens, 64, dtype=torch.float64, device=device) for _ in range(3)]
    whole = torch.zeros(128, 128, dtype=torch.float64, device=device)
    whole.masked_fill_(torch.ones(128, 128, device=device).triu(1).bool(), -torch.inf)
    expected = scaled_dot_product_attention(*states, attn_mask=whole[START:STOP, START:STOP])
    query, key, value = (x.bfloat16().requires_grad_() for x in states)
    mask = whole.bfloat16()[None, None, START:STOP, START:STOP]
    with sdpa_kernel(backend):
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found.sum().backward()
    error = (found.double() - expected).abs().max()
    yield Measure(id=f"{backend.name}, a sliced mask", value=float(error), unit="largest error", target="<= 0.05")


def layout(context: Context) -> Iterator[Measure]:
    from transformers import AutoModelForCausalLM

    from spin_ray.learner.layout import choose_layout

    for dtype in (torch.float32, torch.bfloat16):
        folder = model_folder(context, "0.1B")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        chosen = choose_layout(model.eval(), "auto", max_length=64, device=device_of(context), dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        packs = float(chosen.layout == "packed")
        yield Measure(id=f"layout probe in {name} packs", value=packs, unit="1 is yes", target=">= 1", note=str(chosen))


KERNELS = (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
ITEMS: dict[str, Item] = {backend.name.lower(): partial(kernel, backend) for backend in KERNELS} | {"layout": layout}
