"""Imported by vLLM in each worker process of a CPU engine (``worker_extension_cls``) before anything computes there."""

from spin_ray.runtime import cpu

cpu.allow_amx_kernels()


class CpuWorker:
    """Adds nothing to vLLM's worker: what this module does when it is imported is all that is wanted of it."""
