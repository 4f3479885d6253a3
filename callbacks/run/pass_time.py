"""``time_pass``: how long a forward and a backward pass of some samples take."""

from __future__ import annotations

import time
from collections.abc import Sequence

import lightning.pytorch as pl
import torch

from lightning_conv.callbacks.run.data.batch import to_device
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.kernels.sharded.passes import seconds_of_pass
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import map_inputs, sample_count, spread
from lightning_conv.networks.sharded import is_sharded
from lightning_conv.networks.state import restored
from lightning_conv.networks.undisturbed import undisturbed

FEWEST_SAMPLES = 4
"""Samples of the first trial, at least."""

REPEATED = 0.02
"""Seconds of a pass up to which it is timed twice, since the first one loads and plans."""


def time_pass(trainer: pl.Trainer, measurement: Measurement, samples: int) -> tuple[float, int]:
    """Return the seconds of a forward and a backward pass of some samples, and the number of outputs.

    Where a few samples take long, those of more are taken to be as much longer.

    Args:
        trainer: Trainer of the run.
        measurement: What is measured.
        samples: Number of samples.
    """
    few = min(FEWEST_SAMPLES, samples)
    sizes = [few] if few == samples else [few, samples]
    *_, (timed, (seconds, _), outputs) = _timed(trainer, measurement, sizes)
    return seconds * samples / timed, outputs


def backward_share(trainer: pl.Trainer, measurement: Measurement) -> float:
    """Return the share of a forward and a backward pass that the backward pass takes; it ends at the first of the parameters.

    Args:
        trainer: Trainer of the run.
        measurement: What is measured.

    Cost: two or three passes of ``FEWEST_SAMPLES`` samples.
    """
    few = min(FEWEST_SAMPLES, sample_count(measurement.inputs))
    ((_, (seconds, backward), _),) = _timed(trainer, measurement, [few])
    return backward / seconds if seconds > 0 else 1.0


def _timed(
    trainer: pl.Trainer, measurement: Measurement, sizes: Sequence[int]
) -> list[tuple[int, tuple[float, float], int]]:
    """Time one number of samples after the other, until a pass takes ``REPEATED``.

    Returns:
        For each the number of samples, the seconds of both passes and of the backward pass, and the number of outputs.
    """
    network, found = measurement.network(), []
    batches = [to_device(spread(measurement.inputs, size), trainer.lightning_module.device) for size in sizes]
    if is_sharded(network):
        with isolated():
            seconds_of_pass(network, measurement.parameters, batches[0])  # the first one loads and plans
            both, backward, outputs = seconds_of_pass(network, measurement.parameters, batches[-1])
        return [(sizes[-1], (together(trainer, both), together(trainer, backward)), outputs)]
    with isolated(), restored(network), undisturbed(network):
        # Whose statistics BatchNorm holds constant does not matter to the time.
        module = StatelessModule(network, batch_norm="batch" if measurement.probe.batch_norm == "batch" else "eval")
        parameters = {name: module.parameters[name].requires_grad_() for name in measurement.parameters}
        for size, inputs in zip(sizes, batches, strict=True):
            rows = map_inputs(lambda tensor: tensor, module.convert(inputs))
            seconds: list[tuple[float, float]] = []
            while not seconds or (len(seconds) == 1 and seconds[0][0] < REPEATED):
                before = time.perf_counter()
                made = module.outputs(parameters, rows)
                between = time.perf_counter()
                torch.autograd.grad(made.sum(), list(parameters.values()), allow_unused=True)
                now = time.perf_counter()
                seconds.append((now - before, now - between))
            both, backward = (together(trainer, each) for each in min(seconds))
            found.append((size, (both, backward), made.shape[1]))
            if both >= REPEATED:
                break
    return found


def together(trainer: pl.Trainer, value: float) -> float:
    """Return the first process's number on all of them, so that they choose alike."""
    return float(trainer.strategy.broadcast(value)) if trainer.world_size > 1 else value
