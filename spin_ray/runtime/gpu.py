"""The environment and the abilities of a card that trains."""

import os
from typing import Any

from spin_ray.errors import ResourceError

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def environment(*, deterministic: bool = False) -> dict[str, str]:
    """Returns the environment for a process that trains on a GPU, less what the user set.

    Packs of many lengths leave holes in fixed segments of memory; segments that grow have none.
    """
    values = {} if any(name in os.environ for name in _ALLOCATOR) else {_ALLOCATOR[0]: "expandable_segments:True"}
    return values | ({"TORCHINDUCTOR_DETERMINISTIC": "1"} if deterministic else {})


def check(device: Any, precision: str) -> None:
    """Checks that a worker's card can compute in ``precision``.

    Raises:
        ResourceError: the card has no bf16.
    """
    import torch

    if device.type != "cuda" or precision != "bf16":
        return
    with torch.cuda.device(device):
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ResourceError(
                f"train.precision: bf16 is not computed by {torch.cuda.get_device_name(device)}; "
                "set fp32, or take a card of compute capability 8.0 or later"
            )
