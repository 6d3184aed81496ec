"""Peak rates of devices, and the share that programs reach."""

from dataclasses import dataclass, replace
from typing import Self

from spin_ray.config.sections import ResourcesConfig

GB, GIB = 1e9, 2.0**30

COMPUTE_EFFICIENCY = 0.40
"""An assumption: Megatron-LM's fused kernels reach 0.42-0.56 on A100 (arXiv 2205.05198, table 5)."""
BANDWIDTH_EFFICIENCY = 0.60
"""An assumption for memory and links."""
ETHERNET = 1.25 * GB
"""Bytes/s of a GPU's share of the network where no board names a faster one: 10 Gb/s, an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Peak rates and memory of a device, or of a worker's share."""

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
    """Bytes/s to and from the node's memory, one direction: PCIe 4.0 x16, unless the board has 5.0."""
    efficiency: float = COMPUTE_EFFICIENCY
    """Share of the peak that programs reach: an assumption, unless ``rates`` has a measurement."""

    def seconds(self, flops: float, precision: str) -> float:
        peak = self.fp32 if precision in ("fp32", "float32") else self.bf16
        return flops / (peak * self.efficiency)

    def reading(self, count: float) -> float:
        return count / (self.bandwidth * BANDWIDTH_EFFICIENCY)

    def share(self, resources: ResourcesConfig) -> Self:
        """Returns a worker's part: a GPU or its time, or CPU cores with memory."""
        if resources.gpus:
            part = min(1.0, resources.gpus)
            return replace(self, bf16=self.bf16 * part, fp32=self.fp32 * part, bandwidth=self.bandwidth * part)
        cores = resources.threads
        return replace(
            self, bf16=self.bf16 * cores, fp32=self.fp32 * cores, memory=self.memory * cores,
            bandwidth=self.bandwidth * cores,
        )  # fmt: skip


CPU = Hardware(name="cpu", bf16=143e9, fp32=143e9, memory=12 * GIB, bandwidth=10 * GB, link=1 * GB)
"""One core of the machine in docs/measured.md (``benchmarks/plan_check.py``). bf16 is no faster there. Bandwidth and
link are assumptions."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Hardware(
            name="A100-80G",
            bf16=312e12,
            fp32=19.5e12,
            memory=80 * GB,
            bandwidth=2039 * GB,
            link=300 * GB,
            network=25 * GB,
        ),
        Hardware(
            name="A100-40G",
            bf16=312e12,
            fp32=19.5e12,
            memory=40 * GB,
            bandwidth=1555 * GB,
            link=300 * GB,
            network=25 * GB,
        ),
        Hardware(
            name="H100-80G",
            bf16=989e12,
            fp32=67e12,
            memory=80 * GB,
            bandwidth=3350 * GB,
            link=450 * GB,
            network=50 * GB,
            host=64 * GB,
        ),
        Hardware(
            name="H200",
            bf16=989e12,
            fp32=67e12,
            memory=141 * GB,
            bandwidth=4800 * GB,
            link=450 * GB,
            network=50 * GB,
            host=64 * GB,
        ),
        Hardware(
            name="B200",
            bf16=2250e12,
            fp32=75e12,
            memory=180 * GB,
            bandwidth=8000 * GB,
            link=900 * GB,
            network=50 * GB,
            host=64 * GB,
        ),
        Hardware(
            name="L4", bf16=121e12, fp32=30.3e12, memory=24 * GB, bandwidth=300 * GB, link=32 * GB, network=1.5625 * GB
        ),
        Hardware(
            name="L40S", bf16=362e12, fp32=91.6e12, memory=48 * GB, bandwidth=864 * GB, link=32 * GB, network=6.25 * GB
        ),
        Hardware(name="RTX-4090", bf16=165.2e12, fp32=82.6e12, memory=24 * GB, bandwidth=1008 * GB, link=32 * GB),
        Hardware(
            name="RTX-5090",
            bf16=209.5e12,
            fp32=104.8e12,
            memory=32 * GB,
            bandwidth=1792 * GB,
            link=64 * GB,
            host=64 * GB,
        ),
    )
}
"""Dense rates of NVIDIA's data sheets; RTX cards with sums in fp32. None is measured here.

A100, H100, H200: data sheets of the SXM boards (2021, 2022, 2024). B200: a GPU of DGX B200 (data sheet, 2024).
L4, L40S: data sheets (2023), PCIe 4.0 x16. RTX 4090: white paper of Ada (2022).
RTX 5090: white paper of RTX Blackwell (2025), PCIe 5.0 x16.
Network: DGX A100 has 8 adapters of 200 Gb/s for 8 GPUs; DGX H100, H200 and B200 have 8 of 400 Gb/s (their data sheets).
L4 and L40S: 100 and 400 Gb/s for 8 GPUs (AWS g6.48xlarge, g6e.48xlarge). RTX cards: ``ETHERNET``.
"""

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-80GB": "A100-80G",
    "NVIDIA A100-SXM4-40GB": "A100-40G",
    "NVIDIA H100 80GB HBM3": "H100-80G",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
    "NVIDIA GeForce RTX 5090": "RTX-5090",
}
"""Names in ``GPUS`` by the driver's names. Boards with other rates (H100 PCIe) are left out."""
