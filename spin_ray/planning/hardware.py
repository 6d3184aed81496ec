"""Peak rates of GPUs and CPU cores from data sheets, and the share of a peak that programs reach."""

from dataclasses import dataclass, replace
from typing import Self

from spin_ray.config.sections import ResourcesConfig

GB, GIB = 1e9, 2.0**30

COMPUTE_EFFICIENCY = 0.40
"""Share of peak FLOP/s that matrix products reach. An assumption for GPUs: Megatron-LM reports 0.42-0.56 on A100
(arXiv 2205.05198, table 5), with fused kernels that are not used here."""
BANDWIDTH_EFFICIENCY = 0.60
"""Share of peak memory and link bandwidth that programs reach. An assumption, not measured."""
NETWORK = 25 * GB
"""Bytes/s from one GPU to another node: an adapter of 200 Gb/s per GPU, as in a DGX A100. Other machines have less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The peak rates and the memory of one device, or of the share of it that one worker holds."""

    name: str
    bf16: float
    """FLOP/s, dense."""
    fp32: float
    """FLOP/s without TF32, which torch turns off by default."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to its neighbours in a node, one direction."""

    def seconds(self, flops: float, precision: str) -> float:
        """Returns the seconds of so many FLOPs of matrix products."""
        peak = self.fp32 if precision in ("fp32", "float32") else self.bf16
        return flops / (peak * COMPUTE_EFFICIENCY)

    def reading(self, count: float) -> float:
        """Returns the seconds to stream ``count`` bytes through memory."""
        return count / (self.bandwidth * BANDWIDTH_EFFICIENCY)

    def sending(self, count: float) -> float:
        """Returns the seconds to send ``count`` bytes over the link."""
        return count / (self.link * BANDWIDTH_EFFICIENCY)

    def share(self, resources: ResourcesConfig) -> Self:
        """Returns what a worker holds: a GPU or a fraction of its time, or CPU cores with their part of the memory."""
        if resources.gpus:
            part = min(1.0, resources.gpus)
            return replace(self, bf16=self.bf16 * part, fp32=self.fp32 * part, bandwidth=self.bandwidth * part)
        cores = resources.threads
        return replace(
            self, bf16=self.bf16 * cores, fp32=self.fp32 * cores, memory=self.memory * cores,
            bandwidth=self.bandwidth * cores,
        )  # fmt: skip


CPU = Hardware(name="cpu", bf16=143e9, fp32=143e9, memory=12 * GIB, bandwidth=10 * GB, link=1 * GB)
"""One core of the machine in the README's section "Measured". FLOP/s: half of what fp32 products reached on its two
cores (``benchmarks/plan_check.py``); bf16 is no faster there. Memory: half of its 24 GiB. Bandwidth and link (gloo):
assumptions."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Hardware(name="A100-80G", bf16=312e12, fp32=19.5e12, memory=80 * GB, bandwidth=2039 * GB, link=300 * GB),
        Hardware(name="A100-40G", bf16=312e12, fp32=19.5e12, memory=40 * GB, bandwidth=1555 * GB, link=300 * GB),
        Hardware(name="H100-80G", bf16=989e12, fp32=67e12, memory=80 * GB, bandwidth=3350 * GB, link=450 * GB),
        Hardware(name="L4", bf16=121e12, fp32=30.3e12, memory=24 * GB, bandwidth=300 * GB, link=32 * GB),
    )
}
"""From NVIDIA's data sheets: the SXM boards with NVLink, and L4 with PCIe 4.0 x16."""
