"""Replaces ``train.precision: auto`` for a whole run."""

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.errors import first_line
from spin_ray.runtime import cpu
from spin_ray.runtime.probes import in_own_process, once_per_boot

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "fp32"]

_RACE = """
import os, time, torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
def fastest(dtype):
    a = torch.ones(512, 512, dtype=dtype)
    a @ a.T
    seconds = []
    while not seconds or (sum(seconds) < 0.3 and len(seconds) < 50):
        start = time.perf_counter()
        a @ a.T
        seconds.append(time.perf_counter() - start)
    return min(seconds)
print("bf16" if fastest(torch.bfloat16) < fastest(torch.float32) else "fp32")
"""
"""Program that times products. Only the fastest count, as other programs slow down the rest."""
_CARD = """
import torch
old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
print("fp32" if old else "bf16")
"""
_KERNELS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
_NVIDIA = Path("/dev/nvidiactl")


def with_precision(config: SpinConfig, begun: SpinConfig | None = None) -> SpinConfig:
    """Replaces ``train.precision: auto`` by bf16 or fp32.

    Args:
        begun: recipe of a run that goes on, whose precision stays.
    """
    if begun:
        config = config.settle_precision(begun)
    if config.train.precision != "auto":
        return config
    precision = faster_precision(config.train.resources)
    return config.with_train(precision=precision)


def faster_precision(resources: ResourcesConfig) -> Precision:
    """Returns bf16 for GPUs, unless this machine's GPU lacks it; on CPUs times both, as some only emulate bf16."""
    return _of_card() if resources.gpus else _of_cpu(resources.threads)


def _of_cpu(threads: int) -> Precision:
    environment = os.environ | cpu.environment(threads)
    kernels = json.dumps([environment.get(name) for name in _KERNELS])
    name = f"cpu-precision-{hashlib.sha256(kernels.encode()).hexdigest()[:12]}"
    return _told(name, _RACE, environment, otherwise="fp32")


def _of_card() -> Precision:
    if not _NVIDIA.exists():
        return "bf16"
    return _told("gpu-precision", _CARD, os.environ, otherwise="bf16")


def _told(name: str, program: str, environment: Mapping[str, str], otherwise: Precision) -> Precision:

    def ask() -> str:
        try:
            ended = in_own_process(program, environment)
        except subprocess.TimeoutExpired as error:
            why = first_line(error)
        else:
            if ended.returncode == 0:
                return ended.stdout.strip()
            why = (ended.stderr.splitlines() or [f"exit code {ended.returncode}"])[-1]
        logger.warning("train.precision: bf16 and fp32 could not be compared (%s); %s is taken", why, otherwise)
        return otherwise

    return "bf16" if once_per_boot(name, ask) == "bf16" else "fp32"
