"""``predict``: seconds, bytes and messages of a measurement on many ranks of a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from lightning_conv.kernels.planning.computed import weights
from lightning_conv.kernels.planning.costs import network_flops
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.planning.scale import device_rates
from lightning_conv.kernels.planning.work import Work, work_of
from lightning_conv.machine.devices import Device

EIGENVALUES = 1e10
"""Flops per second of the eigenvalues of a matrix in float64 (assumed for every device, not measured)."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one measurement, a kernel with its eigenvalues, takes on each of several ranks.

    Attributes:
        device: What each rank runs on.
        nodes: Number of nodes.
        work: Flops, bytes and messages of a rank.
        parts: Seconds of each part, with data sent as the engine sends them, by gloo.
        same: The seconds of those parts that do not become less with more ranks.
        divided: Seconds of a measurement that is divided, with data sent by gloo: where that takes longer than computing, the engine lets
            each rank compute the whole kernel instead.
        direct: The same, if the data went over NVLink or InfiniBand; the engine does not do that for kernels that it divides, and FSDP does
            it for parameters.
        parameters: Bytes of the parameters that a rank has.
    """

    device: Device
    nodes: int
    work: Work
    parts: Mapping[str, float]
    same: Mapping[str, float]
    divided: float
    direct: float
    parameters: float

    @property
    def seconds(self) -> float:
        """Seconds of a measurement."""
        return math.fsum(self.parts.values())

    @property
    def same_seconds(self) -> float:
        """Seconds that do not become less with more ranks."""
        return math.fsum(self.same.values())

    @property
    def fits(self) -> bool:
        """Whether parameters and additional memory fit into that of the device."""
        return self.parameters + self.work.memory <= self.device.memory


def predict(
    plan: NTKPlan,
    device: Device,
    ranks: int = 1,
    *,
    sharded: bool = False,
    frozen: float = 0.0,
    others: int = 0,
    spectrum: bool = True,
) -> Prediction:
    """Predict a measurement on many ranks, one per device.

    Args:
        plan: Of one process, from ``plan_ntk``.
        device: What each rank runs on.
        ranks: Their number.
        sharded: Whether the parameters are divided among the ranks.
        frozen: Flops of a forward pass of one sample in layers that the kernel is not over.
        others: Number of parameters that the kernel is not over.
        spectrum: Whether eigenvalues are computed, too.

    Raises:
        TypeError: ``ranks`` is no whole number.
        ValueError: ``ranks`` is less than 1, or the samples of the kernel couple.
    """
    rates = device_rates(device, plan.precision)
    byte, latency = device.direct(ranks)
    paid = 1 / rates.matrices if device.is_gpu else None
    found = partial(work_of, plan, ranks, sharded=sharded, frozen=frozen, others=others)
    work, over = found(rate=paid), found()
    parts, shared = rates.parts(work), rates.parts(over)
    same = {name: getattr(rates, name) * getattr(work.same, name) for name in ("matrices", "small", "moved")}
    same["fixed"] = rates.fixed
    if spectrum:
        parts["eigenvalues"] = same["eigenvalues"] = shared["eigenvalues"] = work.eigenvalues / EIGENVALUES
    divided = math.fsum(shared.values())
    direct = divided - shared["sent"] - shared["message"] + over.sent / byte + over.messages * latency
    if work.by == "parameters":
        # FSDP gathers over the device's own connections, beside the few meetings.
        parts["gathered"] = same["gathered"] = work.gathered / byte + work.messages * latency
        parts["message"] = 0.0
        divided = direct = math.fsum(parts.values())
    held = plan.problem.width * (weights(plan) + others)
    return Prediction(
        device=device,
        nodes=device.nodes(ranks),
        work=work,
        parts=parts,
        same=same,
        divided=divided,
        direct=direct,
        parameters=held / ranks if sharded else held,
    )


def step_seconds(plan: NTKPlan, device: Device, ranks: int, batch: int, *, others: int = 0) -> float:
    """Predict a training step in float32: a forward and a backward pass of a batch, and the sum of the gradients over the ranks.

    Args:
        plan: Of a kernel of the network.
        device: What each rank runs on.
        ranks: Their number.
        batch: Samples per rank.
        others: Number of parameters that the kernel is not over.
    """
    forward, backward = network_flops(plan.reading.sites)
    rates = device_rates(device)
    byte, latency = device.direct(ranks)
    gradients = 2 * 4 * (weights(plan) + others) * (ranks - 1) / ranks
    passes = batch * (2 * forward + backward) * rates.small + 2 * batch * plan.sample_bytes * rates.moved
    return passes + gradients / byte + 2 * (ranks - 1) * latency
