"""``NoiseOfRun``: how the gradients of the probe's samples scatter, pooled over the measurements of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.health.update_of_run import ProbeGradient
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_step import finding_of_noise
from lightning_conv.health.kernel.gradient_noise import GradientNoise, gradient_noise, noise_scale
from lightning_conv.health.layers.layer_gradients import zero_share
from lightning_conv.kernels.gram import KernelGram, ntk_gram

POOLED = 5
"""Measurements over which the noise scale is pooled."""


class NoiseOfRun:
    """Keeps the last measurements of one run.

    Attributes:
        zeros: Share of zeros in the gradient of the probe at the last measurement; NaN: not known, None: it never was.
    """

    def __init__(self) -> None:
        self.zeros: float | None = None
        self._measured: list[GradientNoise] = []

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the measurements in plain types and tensors."""
        return [asdict(each) for each in self._measured]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restore what ``state_dict`` returned."""
        self._measured = [GradientNoise(**each) for each in state]

    def measure(self, run: RunView, gram: KernelGram, gradient: ProbeGradient) -> Finding | None:
        """Measure the noise at the weights of now; None: the size of a batch is not known, or the loss is not.

        Args:
            run: The run at this moment.
            gram: The kernel on the probe.
            gradient: Of the probe.

        Cost: two forward and two backward passes of the probe, and what ``ntk_gram`` measures again of a network that was read.
        """
        if gradient.value:
            self.zeros = zero_share(gradient.value)
        batch = run.step_samples
        if batch is None or run.loss_unknown or run.loss_targets is None:
            return None
        products = _products(run, gram)
        noise = gradient_noise(products)
        self._measured = [*self._measured, noise][-POOLED:]
        scale = noise_scale(self._measured, products)
        return finding_of_noise(noise, scale, batch=batch, training_samples=run.sampling.size, step=run.step)


def _products(run: RunView, gram: KernelGram) -> Tensor:
    """Return the inner products of the gradients of the samples' own losses, (n, n)."""
    measurement = run.measurement
    if measurement.cotangents is not None:
        matrix = gram.matrix
    else:
        targets, rows = measurement.targets, measurement.rows
        s = measurement.probe_loss.gradients(lambda: run.shaped_outputs, targets, rows)
        with isolated():
            matrix = ntk_gram(
                run.network,
                run.inputs,
                cotangents=s.to(torch.get_default_dtype()),
                parameters=list(measurement.parameters),
                precision="fast",
                batch_norm=measurement.probe.batch_norm,
                max_memory=measurement.probe.max_memory,
                plan=gram.plan,
                remeasure=gram.plan is not None,
                progress=False,
            ).matrix
    # The gradient of a mean carries 1 / n.
    return matrix if run.loss.summed else matrix * run.samples**2
