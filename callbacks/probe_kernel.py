"""One kernel a step on one probe, shared by all monitors of equal settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_conv.callbacks.probe import Probe, to_device
from lightning_conv.callbacks.schedule import Schedule
from lightning_conv.evaluation import Inputs
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.precision import Precision
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.spectrum import Spectrum

WARM_UP_SECONDS = 1.0


class ProbeKernel:
    """The kernel on a probe's samples: computed at most once for each step, whoever asks.

    Args:
        probe: settings.
        inputs: the samples.
        parameters: names, in ``probe.network(...)``, of those that were trainable at the start. They stay the same when some are
            frozen later, because kernels over different parameters cannot be compared.
        schedule: decides when to measure.
    """

    def __init__(self, probe: Probe, inputs: Inputs, parameters: Sequence[str], schedule: Schedule) -> None:
        self.probe, self.inputs, self.parameters, self.schedule = probe, inputs, tuple(parameters), schedule
        self.precision: Precision = "fast"  # the one that resolved lambda_min last
        self._decisions: dict[int, bool] = {}
        self._measured: tuple[int, KernelGram, Spectrum] | None = None

    def due(self, step: int, trainer: pl.Trainer) -> bool:
        """One decision a step, the same for all callbacks and ranks."""
        if step not in self._decisions:
            decision = self.schedule.due(step)
            if self.schedule.every_n_steps is None and trainer.world_size > 1:
                decision = bool(trainer.strategy.broadcast(decision))
            self._decisions = {step: decision}
        return self._decisions[step]

    def at(self, step: int, pl_module: pl.LightningModule) -> tuple[KernelGram, Spectrum]:
        """Kernel and spectrum of the weights after ``step`` optimizer steps."""
        if self._measured is None or self._measured[0] != step:
            seconds, gram, spectrum = self._compute(pl_module)
            by_time = self.schedule.every_n_steps is None
            if by_time and self._measured is None and seconds < WARM_UP_SECONDS:
                # The first call pays for one-off set-up as well; once more tells what the next one will cost.
                seconds = self._compute(pl_module)[0]
            self.schedule.expect(seconds)
            self._measured = step, gram, spectrum
        return self._measured[1:]

    def _compute(self, pl_module: pl.LightningModule) -> tuple[float, KernelGram, Spectrum]:
        start = time.perf_counter()
        gram, spectrum = resolved_spectrum(
            self.probe.network(pl_module),
            to_device(self.inputs, pl_module.device),
            outputs=self.probe.outputs,
            parameters=self.parameters,
            start=self.precision,
            batch_norm=self.probe.batch_norm,
            max_memory=self.probe.max_memory,
        )
        self.precision = gram.precision
        return time.perf_counter() - start, gram, spectrum


def gram_state(gram: KernelGram) -> dict[str, Any]:
    """A Gram matrix as plain types, for a checkpoint."""
    return vars(gram) | {"matrix": gram.matrix.cpu()}


def gram_from_state(state: dict[str, Any]) -> KernelGram:
    """The inverse of ``gram_state``."""
    return KernelGram(**state)
