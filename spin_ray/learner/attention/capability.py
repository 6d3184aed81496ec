"""Lacks of GPUs: kernels on old ones, shared memory on small ones."""

from typing import Any

import torch

KERNELS_NEED = (8, 0)
"""Lowest compute capability for the kernels (Ampere)."""


def too_old(device: torch.device, what: str) -> str | None:
    if device.type != "cuda":
        return None
    has = torch.cuda.get_device_capability(device)
    if has >= KERNELS_NEED:
        return None
    return f"{what} needs compute capability {_spelt(KERNELS_NEED)}, and {_card(device)} has {_spelt(has)}"


def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a block of threads of this GPU may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the attribute
    return properties.shared_memory_per_block_optin


def _spelt(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
