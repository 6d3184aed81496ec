"""Frozen 4- or 8-bit weights by bitsandbytes, on which adapters train (QLoRA, arXiv 2305.14314).

nf4 has double quantisation, int8 is LLM.int8(). Embeddings, norms and head keep the computation's precision.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spin_ray.config.packages import check_installed

Format = Literal["nf4", "int8"]


def load_quantised(
    source: str | Path, base: Format, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> Any:
    """Loads the causal LM with quantised linear layers onto the device.

    No linear layer is whole there unquantised. All other weights are, until they are sharded: embeddings, head, and the
    experts of a mixture, which are no linear layers in transformers.

    Raises:
        ConfigError: bitsandbytes or accelerate is missing.
    """
    check_installed(f"train.lora.base: {base}", "quantised")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=base == "nf4", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, load_in_8bit=base == "int8",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=dtype, attn_implementation="sdpa", quantization_config=how, device_map={"": device},
        trust_remote_code=trust_remote_code, use_safetensors=None if trust_remote_code else True,
    ).requires_grad_(False)  # fmt: skip
    for module in model.modules():
        # On some CPUs bitsandbytes 0.50 repacks the weights in scoring, not in training, and rounds their scales.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quantised_weights(model: nn.Module) -> set[nn.Parameter]:
    """Returns the integer weights, which cannot be sharded: each worker holds all of them."""
    return {parameter for parameter in model.parameters() if not parameter.is_floating_point()}
