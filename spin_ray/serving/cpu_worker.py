"""Permission for AMX kernels. vLLM imports this module (``worker_extension_cls``) before a worker computes."""

from spin_ray.runtime import cpu

cpu.allow_amx_kernels()


class CpuWorker:
    """An empty extension of vLLM's worker."""
