"""The training backends."""

import inspect
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
METHODS = ("logps", "score", "backward", "step", "save", "load", "export_hf")
"""Methods of ``TrainBackend`` that every algorithm needs."""
ATTRIBUTES = ("device",)
"""Attributes of ``TrainBackend`` that training reads."""


def make_backend(model_dir: str | Path, settings: BackendSettings, device: torch.device) -> TrainBackend:
    """Builds the backend that ``settings`` name.

    Raises:
        ConfigError: there is none, or it lacks a method or an attribute that training asks for.
    """
    backend = find_backend(settings.kind)(model_dir, settings, device)
    if settings.kind not in BACKENDS:
        _refuse_without(backend, METHODS, settings.kind)
        _refuse_other_signatures(backend, METHODS, settings.kind)
        if missing := [name for name in ATTRIBUTES if not hasattr(backend, name)]:
            raise ConfigError(
                f"train.backend: {settings.kind} has no attribute {', '.join(missing)}; set it when built"
            )
    return backend


def find_backend(kind: str) -> Callable[[str | Path, BackendSettings, torch.device], TrainBackend]:
    """Returns the class for a name or import path.

    Raises:
        ConfigError: the backend does not exist, or is not callable.
    """
    build = import_object(BACKENDS.get(kind, kind), "train.backend", BACKENDS)
    if not callable(build):
        raise ConfigError(f"train.backend: {kind} is no class")
    return build


def makes_dtensors(kind: str) -> bool:
    """Returns True if the backend is FSDP2 or a subclass of it, whose weights are DTensors."""
    if kind in BACKENDS:
        return kind == "fsdp2"
    from spin_ray.learner.backends.fsdp2 import Fsdp2Backend

    build = find_backend(kind)
    return isinstance(build, type) and issubclass(build, Fsdp2Backend)


def check_backend(kind: str, mesh: Mesh | None, methods: Iterable[str]) -> None:
    """Checks a backend that is given by its path. Those by name have all of ``TrainBackend``, and are not imported.

    Args:
        methods: methods that the algorithm needs beside ``METHODS``.

    Raises:
        ConfigError: as ``find_backend`` does, or the backend lacks a method, takes other arguments (as one of its
            methods may) or does not build ``mesh``.
    """
    if kind in BACKENDS and all(hasattr(TrainBackend, method) for method in methods):
        return
    build = find_backend(kind)
    if mesh is not None and not makes_dtensors(kind):
        raise ConfigError(f"train.mesh: {kind} is no subclass of Fsdp2Backend, which builds it; leave it out")
    if isinstance(build, type) and not hasattr(build, "__getattr__"):  # else only its objects tell what they have
        _refuse_without(build, (*methods, *METHODS), kind)
        _refuse_other_signatures(build, (*methods, *METHODS), kind)
    _refuse_other_arguments(build, kind)


def _refuse_without(backend: object, methods: Iterable[str], kind: str) -> None:
    if missing := [method for method in methods if not _has(backend, method)]:
        raise ConfigError(f"train.backend: {kind} has no method {', '.join(missing)}, which training needs")


def _has(backend: object, method: str) -> bool:
    """Returns False also for a method that does nothing because it is inherited from the protocol."""
    found = getattr(backend, method, None)
    return callable(found) and getattr(found, "__func__", found) is not getattr(TrainBackend, method, None)


def _refuse_other_signatures(backend: object, methods: Iterable[str], kind: str) -> None:
    """Refuses methods that cannot be called as those of ``TrainBackend``."""
    for method in methods:
        if not hasattr(TrainBackend, method):
            continue
        _, *expected = inspect.signature(getattr(TrainBackend, method)).parameters.values()  # without self
        named = {it.name: None for it in expected if it.kind is inspect.Parameter.KEYWORD_ONLY}
        given = [it.name for it in expected if it.name not in named]
        static = inspect.getattr_static(backend, method, None) if isinstance(backend, type) else None
        of_class = inspect.isfunction(static)
        if isinstance(backend, type) and not of_class and not isinstance(static, staticmethod | classmethod):
            continue  # a functools.partialmethod, say; the object tells what it takes
        try:
            signature = inspect.signature(getattr(backend, method))
        except ValueError:  # some functions in C tell none
            continue
        try:
            signature.bind(*(["self"] if of_class else []), *given, **named)
        except TypeError as error:
            call = ", ".join([*given, *(f"{name}=…" for name in named)])
            raise ConfigError(
                f"train.backend: {kind}.{method} takes {signature}, but is called as {method}({call}): {error}"
            ) from error


def _refuse_other_arguments(build: Callable[..., TrainBackend], kind: str) -> None:
    try:
        signature = inspect.signature(build)
    except ValueError:  # some functions in C tell none
        return
    try:
        signature.bind("model_dir", "settings", "device")
    except TypeError as error:
        raise ConfigError(
            f"train.backend: {kind} is not called as ({', '.join(signature.parameters)}), but as (model_dir, settings, "
            f"device): {error}"
        ) from error
