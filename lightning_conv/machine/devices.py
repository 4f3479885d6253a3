"""``Device``: rates of a processor and of its connections, from published figures; ``device_named`` finds one by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from lightning_conv.machine.gemm import calibrated
from lightning_conv.machine.memory import available_memory

SUSTAINED = 0.5
"""Share of the published flops that products of large matrices are assumed to reach on a GPU (assumed, not measured)."""

SUSTAINED_SMALL = 0.3
"""The same for convolutions and for the many small products that form gradients of single samples (assumed, not measured)."""

SUSTAINED_MEMORY = 0.8
"""Share of the published memory bandwidth that is assumed to be reached (assumed, not measured)."""

SUSTAINED_LINK = 0.65
"""Share of the published bandwidth of NVLink that collectives reach; the value that the simulator Calculon has for an A100
(github.com/calculon-ai/calculon, systems/a100_80g.json)."""

SUSTAINED_NETWORK = 0.9
"""The same for InfiniBand, from the same file."""

LINK_LATENCY = 3.4e-6
"""Seconds of a message over NVLink: a ring with the protocol "simple" in NCCL's own model (src/graph/tuning.cc, NCCL 2.18)."""

NETWORK_LATENCY = 14e-6
"""The same over a network, from the same table."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of a processor as published, or as measured here for ``"cpu"``.

    Attributes:
        name: As in ``--device``.
        title: Its full name.
        flops: Flops per second in float32, without TF32, which kernels do not use.
        double_flops: Flops per second of matrix products in float64.
        memory: Bytes of its memory.
        bandwidth: Bytes per second between the processor and its memory.
        per_node: Devices in one node.
        link: Bytes per second that a device sends to others of its node.
        network: Bytes per second that a device sends to other nodes.
        sustained: Share of ``flops`` that products of large matrices reach.
        sustained_small: Share that convolutions and many small products reach.
        sustained_memory: Share of ``bandwidth`` that is reached.
        source: Where the figures come from.
    """

    name: str
    title: str
    flops: float
    double_flops: float
    memory: int
    bandwidth: float
    per_node: int
    link: float
    network: float
    sustained: float
    sustained_small: float
    sustained_memory: float
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is one of ``GPUS``."""
        return self.name in GPUS

    def nodes(self, ranks: int) -> int:
        """Return how many nodes so many ranks take, with one rank per device."""
        return -(-ranks // self.per_node)

    def direct(self, ranks: int) -> tuple[float, float]:
        """Return the bytes per second and the seconds per message of NCCL between so many ranks: those of the slowest connection.

        Args:
            ranks: Their number; more than one node has of them communicate over the network.
        """
        if self.nodes(ranks) > 1:
            return SUSTAINED_NETWORK * self.network, NETWORK_LATENCY
        return SUSTAINED_LINK * self.link, LINK_LATENCY


_HOPPER = (
    "float32 and float64 rates, memory and NVLink (900 GB/s in both directions together): NVIDIA {} Tensor Core GPU data sheet, SXM; "
    "400 Gb/s of InfiniBand per GPU: NVIDIA DGX {} data sheet"
)

GPUS: Mapping[str, Device] = {
    each.name: each
    for each in (
        Device(
            name="a100",
            title="NVIDIA A100 SXM 80 GB",
            flops=19.5e12,
            double_flops=19.5e12,
            memory=80 * 10**9,
            bandwidth=2.039e12,
            per_node=8,
            link=300e9,
            network=25e9,
            sustained=SUSTAINED,
            sustained_small=SUSTAINED_SMALL,
            sustained_memory=SUSTAINED_MEMORY,
            source=(
                "float32 and float64 rates, memory and NVLink (600 GB/s in both directions together): NVIDIA A100 Tensor Core GPU data "
                "sheet, 80 GB SXM; 200 Gb/s of InfiniBand per GPU: NVIDIA DGX A100 data sheet"
            ),
        ),
        Device(
            name="h100",
            title="NVIDIA H100 SXM 80 GB",
            flops=67e12,
            double_flops=67e12,
            memory=80 * 10**9,
            bandwidth=3.35e12,
            per_node=8,
            link=450e9,
            network=50e9,
            sustained=SUSTAINED,
            sustained_small=SUSTAINED_SMALL,
            sustained_memory=SUSTAINED_MEMORY,
            source=_HOPPER.format("H100", "H100"),
        ),
        Device(
            name="h200",
            title="NVIDIA H200 SXM 141 GB",
            flops=67e12,
            double_flops=67e12,
            memory=141 * 10**9,
            bandwidth=4.8e12,
            per_node=8,
            link=450e9,
            network=50e9,
            sustained=SUSTAINED,
            sustained_small=SUSTAINED_SMALL,
            sustained_memory=SUSTAINED_MEMORY,
            source=_HOPPER.format("H200", "H200"),
        ),
    )
}

DEVICES = ("cpu", *GPUS)
"""Names that ``device_named`` takes."""

CPU_SUSTAINED, CPU_SMALL, CPU_MEMORY = 0.7, 0.3, 0.5
"""The same shares of the rates that are measured on a processor (assumed)."""

COPIED = 32 * 2**20
"""Bytes of the tensor whose copying measures the bandwidth of memory: beyond the caches of a core."""


def device_named(name: str) -> Device:
    """Return the device of a name; ``"cpu"`` is this processor, one core per rank, by a short measurement.

    Args:
        name: One of ``DEVICES``; capital letters do not matter.

    Raises:
        ValueError: There is no such device.

    Cost: for ``"cpu"`` about 0.1 s.
    """
    lower = name.lower()
    if lower == "cpu":
        return this_cpu()
    if lower not in GPUS:
        near = get_close_matches(lower, DEVICES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"device: {name!r} is not known; {hint}known are {', '.join(DEVICES)}")
    return GPUS[lower]


def this_cpu() -> Device:
    """Return this processor: the rates of one thread, and a network of loopback, over which everything here is sent.

    Cost: about 0.1 s, and the memory of two tensors of ``COPIED`` bytes.
    """
    threads = torch.get_num_threads()
    return Device(
        name="cpu",
        title=f"this processor, {threads} thread{'s' if threads > 1 else ''} per rank",
        flops=calibrated("cpu", torch.float32, threads)[1],
        double_flops=calibrated("cpu", torch.float64, threads)[1],
        memory=available_memory(torch.device("cpu")),
        bandwidth=_bandwidth(),
        per_node=os.cpu_count() or 1,
        link=1e9,
        network=1e9,
        sustained=CPU_SUSTAINED,
        sustained_small=CPU_SMALL,
        sustained_memory=CPU_MEMORY,
        source="measured here: products of matrices of 512 x 512, and a copy of 32 MiB; a network of 1 GB/s is assumed",
    )


def _bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes, in the fastest of some copies."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / min(seconds[1:])  # the first one gives the pages of the target
