"""The training backends."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from spin_ray.config.sections import Mesh
from spin_ray.errors import ConfigError
from spin_ray.learner.backends.base import BackendSettings, TrainBackend
from spin_ray.learner.import_path import import_object

BACKENDS = {
    "fsdp2": "spin_ray.learner.backends.fsdp2:Fsdp2Backend",
    "deepspeed": "spin_ray.learner.backends.deepspeed:DeepSpeedBackend",
}
"""Import paths, so that only the chosen backend is imported."""


def make_backend(model_dir: str | Path, settings: BackendSettings, device: torch.device) -> TrainBackend:
    return find_backend(settings.kind)(model_dir, settings, device)


def find_backend(kind: str) -> Callable[[str | Path, BackendSettings, torch.device], TrainBackend]:
    """Returns the class for a name or import path.

    Raises:
        ConfigError: the backend does not exist, or is not callable.
    """
    build = import_object(BACKENDS.get(kind, kind), "train.backend", BACKENDS)
    if not callable(build):
        raise ConfigError(f"train.backend: {kind} is no class")
    return build


def check_backend(kind: str, mesh: Mesh | None, methods: Iterable[str]) -> None:
    """Checks a backend that is given by its path. Those by name have all methods, and are not imported.

    Args:
        methods: methods that the algorithm needs.

    Raises:
        ConfigError: as ``find_backend`` does, or the backend lacks a method or does not build ``mesh``.
    """
    if kind in BACKENDS:
        return
    build = find_backend(kind)
    for method in methods:
        if not hasattr(build, method):
            raise ConfigError(f"train.backend: {kind} has no method {method}, which the algorithm needs")
    if mesh is not None:
        from spin_ray.learner.backends.fsdp2 import Fsdp2Backend

        if not (isinstance(build, type) and issubclass(build, Fsdp2Backend)):
            raise ConfigError(f"train.mesh: {kind} is no subclass of Fsdp2Backend, which builds it; leave it out")
