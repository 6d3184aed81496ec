"""Makes CPU compute safe and quick in a process, before torch does its first matrix product.

Some virtual machines advertise AMX (matrix tiles) without the CPUID leaf that describes the tiles. oneDNN then builds
kernels that die of SIGILL at the first bf16 product. A product in a process of its own finds out; where that process
dies, oneDNN is held at AVX-512.
"""

import importlib.util
import logging
import os
from pathlib import Path

from spin_ray.runtime.probes import in_own_process, once_per_boot

logger = logging.getLogger(__name__)

_PROBE = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); assert (a @ a)[0, 0] == 64"
_KEEP = "narenas:1,thp:always,oversize_threshold:0,dirty_decay_ms:300000,muzzy_decay_ms:-1"
_WITHOUT_AMX = "AVX512_CORE_FP16"
_ISA = "ONEDNN_MAX_CPU_ISA"


def keep_freed_memory() -> dict[str, str]:
    """Returns the environment in which to start a process that trains on CPUs.

    glibc gives every freed large tensor back to the kernel, and the next tensor costs a page fault for each 4 KiB: a
    third of a training step. The jemalloc that Ray ships keeps freed memory; without jemalloc, glibc is told to.
    """
    # Memory is kept for 300 s: kept for good, packs of ever new shapes leave holes that add up to gigabytes; kept for
    # 30 s, steps of some seconds take half as long again. One arena: the thread of backward would keep as much again in
    # an arena of its own. No arena for large blocks, which comes with a decay and returns its blocks at once.
    ray = importlib.util.find_spec("ray")
    library = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray and ray.origin else None
    if library and library.exists():
        return {"LD_PRELOAD": str(library), "MALLOC_CONF": _KEEP}
    return {
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest that glibc takes
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch's: huge pages for large tensors
    }


def prepare(threads: int) -> None:
    """Sets the number of compute threads and avoids broken AMX. Call it before anything computes.

    ``threads`` is what Ray gave this process: more threads than free cores slow training more than tenfold.
    """
    os.environ.update(environment(threads))


def allow_amx_kernels() -> None:
    """Asks the kernel for the tile registers; vLLM's own attention kernels use them without asking (vLLM 0.29)."""
    if _amx_is_advertised():
        import torch

        torch.cpu._init_amx()


def environment(threads: int) -> dict[str, str]:
    """Returns the variables that compute libraries read when a process loads them."""
    found = {"OMP_NUM_THREADS": str(threads)}
    if _ISA not in os.environ and _amx_is_advertised() and not _amx_works():
        found[_ISA] = _WITHOUT_AMX
    return found


def _amx_is_advertised() -> bool:
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _amx_works() -> bool:
    def probe() -> str:
        without = {name: value for name, value in os.environ.items() if name != _ISA}
        if in_own_process(_PROBE, without).returncode == 0:
            return "works"
        logger.warning("this machine advertises AMX but cannot run it; oneDNN is held at %s", _WITHOUT_AMX)
        return "broken"

    return once_per_boot("amx", probe) == "works"
