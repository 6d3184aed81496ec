"""A module that allows AMX kernels.

vLLM imports it in each worker process (``worker_extension_cls``) before anything computes.
"""

from spin_ray.runtime import cpu

cpu.allow_amx_kernels()


class CpuWorker:
    """An empty extension of vLLM's worker."""
