"""CPUs of this process, and settings for safe and fast computation on them, made before torch's first matrix product.

Some virtual machines advertise AMX without the CPUID leaf of its tiles, and oneDNN's bf16 kernels die of SIGILL. There
oneDNN is limited to AVX-512.
"""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path

from spin_ray.runtime.cgroups import cpu_limit
from spin_ray.runtime.probes import in_own_process, once_per_boot

logger = logging.getLogger(__name__)

_PROBE = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); assert (a @ a)[0, 0] == 64"
_KEEP = "narenas:1,thp:always,oversize_threshold:0,dirty_decay_ms:300000,muzzy_decay_ms:-1"
_WITHOUT_AMX = "AVX512_CORE_FP16"
_ISA = "ONEDNN_MAX_CPU_ISA"
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def usable_cpus() -> int:
    """Returns the CPUs that this process may use; ``taskset``, Slurm and containers leave it fewer than there are."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    counts = [count for count in (os.cpu_count(), allowed, cpu_limit()) if count]
    return max(1, int(min(counts, default=1)))


def keep_freed_memory() -> dict[str, str]:
    """Returns the environment of a process that trains on CPUs.

    glibc returns large freed tensors to the kernel, and page faults slow training. jemalloc keeps freed memory.
    """
    # dirty_decay: after 300 s, as with 30 s steps take half as long again, and with no limit packs of new shapes leave
    # gigabytes of holes. narenas: the backward thread would keep as much memory in an arena of its own.
    # oversize_threshold: the arena for large blocks would return them at once.
    ray = importlib.util.find_spec("ray")
    library = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray and ray.origin else None
    if library and library.exists():
        return {"LD_PRELOAD": str(library), "MALLOC_CONF": _KEEP}
    return {
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # glibc's maximum
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch's: huge pages for large tensors
    }


def prepare(threads: int) -> None:
    """Sets compute threads and avoids broken AMX; call it before anything computes.

    More threads than free cores slow training more than tenfold.
    """
    os.environ.update(environment(threads))


def allow_amx_kernels() -> None:
    """Asks the kernel for AMX tile registers, which vLLM 0.29's attention kernels do not."""
    if _amx_is_advertised():
        import torch

        torch.cpu._init_amx()


def environment(threads: int) -> dict[str, str]:
    """Returns environment variables that compute libraries read when they load."""
    found = {"OMP_NUM_THREADS": str(threads)}
    if _ISA not in os.environ and _amx_is_advertised() and not _amx_works():
        found[_ISA] = _WITHOUT_AMX
    if (limit := os.environ.get("ATEN_CPU_CAPABILITY")) and _COMPILED not in os.environ:
        # torch 2.13 compiles for the limit, but takes kernels compiled without it from the cache, and the other way
        # round: these compute something else, or write beyond their memory.
        found[_COMPILED] = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{limit}"
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
