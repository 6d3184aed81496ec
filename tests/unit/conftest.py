"""Before torch is imported: what every unit test needs of its process."""

import os

# Some virtual machines advertise AMX without CPUID leaf 0x1D; oneDNN then dies of SIGILL at the first bf16
# matrix product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
