"""Allows AMX kernels in each worker process of a CPU engine.

vLLM imports this module there (``worker_extension_cls``) before anything computes.
"""

from spin_ray.runtime import cpu

cpu.allow_amx_kernels()


class CpuWorker:
    """An extension of vLLM's worker that adds nothing; the import of its module does the work."""
