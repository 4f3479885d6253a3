"""``scale_checked``: what the measurement of a run would take on many ranks of a device."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl

from lightning_conv.callbacks.check.run_check import ScaleCheck
from lightning_conv.callbacks.run.budget import batch_size_of
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.kernels.planning.prediction import predict, step_seconds
from lightning_conv.machine.devices import Device


@dataclass(frozen=True)
class Target:
    """Where a measurement is to be predicted.

    Attributes:
        ranks: Number of ranks.
        device: What each of them runs on.
    """

    ranks: int
    device: Device


def scale_checked(trainer: pl.Trainer, kernel: Measurement, target: Target) -> ScaleCheck:
    """Return what a measurement would take.

    Args:
        trainer: Trainer of the run.
        kernel: What is measured.
        target: Where.

    Raises:
        ValueError: No kernel was planned, or it is one that is not modelled.
    """
    if kernel.plan is None:
        raise ValueError("no kernel was planned: the first measurement waits (every_n_steps= asks for it at once)")
    module = kernel.probe.network(trainer.lightning_module)
    others = sum(each.numel() for each in module.parameters()) - kernel.weights
    found = predict(kernel.plan, target.device, target.ranks, others=others)
    batch = batch_size_of(trainer)
    step = None if batch is None else step_seconds(kernel.plan, target.device, target.ranks, batch, others=others)
    return ScaleCheck(
        ranks=target.ranks,
        nodes=found.nodes,
        device=target.device.title,
        source=target.device.source,
        by=found.work.by,
        seconds=found.seconds,
        divided=found.divided,
        direct=found.direct,
        parts=dict(found.parts),
        same=dict(found.same),
        step=step,
        memory=found.work.memory,
        parameters=found.parameters,
        device_memory=target.device.memory,
        sent=found.work.sent,
        messages=round(found.work.messages),
    )
