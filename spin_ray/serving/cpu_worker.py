"""Permission for AMX kernels: as ``worker_extension_cls``, this is imported before a worker computes anything."""

from spin_ray.runtime import cpu

cpu.allow_amx_kernels()


class CpuWorker:
    """An empty extension of vLLM's worker."""
