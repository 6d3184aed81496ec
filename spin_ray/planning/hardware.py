"""Peak rates of devices, and the shares that programs reach."""

from dataclasses import dataclass, replace
from typing import Self

from spin_ray.config.sections import ResourcesConfig

GB, GIB = 1e9, 2.0**30

COMPUTE_EFFICIENCY = 0.40
"""Share of peak FLOP/s, an assumption. Megatron-LM's fused kernels reach 0.42-0.56 on A100 (arXiv 2205.05198,
table 5)."""
BANDWIDTH_EFFICIENCY = 0.60
"""Share of the peak of memory and links, an assumption."""
ETHERNET = 1.25 * GB
"""Bytes/s of a GPU's network share where its board names none: 10 Gb/s, an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    name: str
    bf16: float
    """FLOP/s, dense."""
    fp32: float
    """FLOP/s without TF32."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s."""
    link: float
    """Bytes/s of one device within a node, one direction."""
    network: float = ETHERNET
    """Bytes/s between nodes, one direction: the device's share of its node's adapters."""
    host: float = 32 * GB
    """Bytes/s to and from the node's memory, one direction. Default: PCIe 4.0 x16."""
    efficiency: float = COMPUTE_EFFICIENCY
    """Share of the peak that is reached: assumed, or measured (``rates``)."""

    def seconds(self, flops: float, precision: str) -> float:
        peak = self.fp32 if precision in ("fp32", "float32") else self.bf16
        return flops / (peak * self.efficiency)

    def reading(self, count: float) -> float:
        return count / (self.bandwidth * BANDWIDTH_EFFICIENCY)

    def share(self, resources: ResourcesConfig) -> Self:
        """Returns a worker's share: a GPU's time and all its memory, or CPU cores with their memory."""
        if resources.gpus:
            part = min(1.0, resources.gpus)
            return replace(self, bf16=self.bf16 * part, fp32=self.fp32 * part, bandwidth=self.bandwidth * part)
        cores = resources.threads
        return replace(
            self, bf16=self.bf16 * cores, fp32=self.fp32 * cores, memory=self.memory * cores,
            bandwidth=self.bandwidth * cores,
        )  # fmt: skip


CPU = Hardware(name="cpu", bf16=143e9, fp32=143e9, memory=12 * GIB, bandwidth=10 * GB, link=1 * GB)
"""One core of the machine in docs/measured.md (``benchmarks/plan_check.py``), where bf16 is no faster. Bandwidth and
link are assumptions."""

_BOARDS = (
    # name, bf16 and fp32 in TFLOP/s, memory in GB, GB/s of memory, links, network and host
    ("A100-80G", 312, 19.5, 80, 2039, 300, 25, 32),
    ("A100-40G", 312, 19.5, 40, 1555, 300, 25, 32),
    ("H100-80G", 989, 67, 80, 3350, 450, 50, 64),
    ("H200", 989, 67, 141, 4800, 450, 50, 64),
    ("B200", 2250, 75, 180, 8000, 900, 50, 64),
    ("L4", 121, 30.3, 24, 300, 32, 100 / 8 / 8, 32),
    ("L40S", 362, 91.6, 48, 864, 32, 400 / 8 / 8, 32),
    ("A10", 125, 31.2, 24, 600, 32, ETHERNET / GB, 32),
    ("RTX-A6000", 154.8, 38.7, 48, 768, 32, ETHERNET / GB, 32),
    ("RTX-3090", 71, 35.6, 24, 936, 32, ETHERNET / GB, 32),
    ("RTX-4090", 165.2, 82.6, 24, 1008, 32, ETHERNET / GB, 32),
    ("RTX-5090", 209.5, 104.8, 32, 1792, 64, ETHERNET / GB, 64),
)
GPUS = {
    name: Hardware(
        name=name, bf16=bf16 * 1e12, fp32=fp32 * 1e12, memory=memory * GB, bandwidth=bandwidth * GB, link=link * GB,
        network=network * GB, host=host * GB,
    )
    for name, bf16, fp32, memory, bandwidth, link, network, host in _BOARDS
}  # fmt: skip
"""Dense rates of NVIDIA's data sheets, with fp32 accumulation on RTX cards. None is measured here.

A100, H100, H200: SXM (2021, 2022, 2024). B200: DGX B200 (2024). L4, L40S (2023): PCIe 4.0 x16. A10 (2021), RTX A6000
(2020).
White papers: RTX 3090, Ampere GA102 (2020); RTX 4090, Ada (2022); RTX 5090, RTX Blackwell (2025), PCIe 5.0 x16.
Network: DGX A100 has 8 adapters of 200 Gb/s for 8 GPUs; DGX H100, H200 and B200 have 8 of 400 Gb/s. L4 and L40S: 100
and 400 Gb/s for 8 GPUs (AWS g6.48xlarge, g6e.48xlarge).

Compared in November 2026 with copies of data sheets and MLPerf's system descriptions: H200, L40S, RTX 4090 and RTX 5090
agree, as do B200's bf16, memory, links and network (MLPerf inference 6.0). B200's fp32 is 80 TFLOP/s in NVIDIA's
technical brief. Written from memory and not compared: L4, A10, RTX A6000, RTX 3090, DGX A100's adapters, AWS's
rates."""

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-80GB": "A100-80G",
    "NVIDIA A100-SXM4-40GB": "A100-40G",
    "NVIDIA H100 80GB HBM3": "H100-80G",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10": "A10",
    "NVIDIA RTX A6000": "RTX-A6000",
    "NVIDIA GeForce RTX 3090": "RTX-3090",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
    "NVIDIA GeForce RTX 5090": "RTX-5090",
}
"""Names in ``GPUS`` by the driver's names. Boards with other rates (H100 PCIe) are left out."""
