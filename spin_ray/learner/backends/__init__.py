"""The training backends by name."""

from pathlib import Path

import torch

from spin_ray.learner.backends.base import BackendSettings, TrainBackend


def make_backend(model_dir: str | Path, settings: BackendSettings, device: torch.device) -> TrainBackend:
    """The backend that ``settings.kind`` names; what the other one needs is not imported."""
    if settings.kind == "deepspeed":
        from spin_ray.learner.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(model_dir, settings, device)
    from spin_ray.learner.backends.fsdp2 import Fsdp2Backend

    return Fsdp2Backend(model_dir, settings, device)
