"""What every test process needs before torch or Ray is imported."""

import os

from spin_ray.runtime import cpu

os.environ.setdefault(
    "RAY_AUTH_MODE", "disabled"
)  # one process starts several clusters; token mode has a test of its own
os.environ.setdefault("HF_HUB_OFFLINE", "1")
cpu.prepare(threads=1)
