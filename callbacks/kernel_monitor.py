"""What the kernel monitors have in common: one probe, one schedule and one kernel a step, shared by callbacks of equal settings."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_conv.callbacks._logging import log_layout
from lightning_conv.callbacks.probe import Probe, to_device
from lightning_conv.callbacks.schedule import Schedule
from lightning_conv.evaluation import Inputs, sample_count
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.precision import Precision
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.spectrum import Spectrum

WARM_UP_SECONDS = 1.0


class ProbeKernel:
    """The kernel on a probe's samples: computed at most once for each step, whoever asks."""

    def __init__(self, probe: Probe, inputs: Inputs, schedule: Schedule, precision: Precision = "fast") -> None:
        self.probe, self.inputs, self.schedule = probe, inputs, schedule
        self.precision: Precision = precision  # the one that resolved lambda_min last
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
            start=self.precision,
            batch_norm=self.probe.batch_norm,
            max_memory=self.probe.max_memory,
        )
        self.precision = gram.precision
        return time.perf_counter() - start, gram, spectrum


class KernelMonitor(pl.Callback):
    """Base of the monitors: measures at the first step, when due, and at the last step; subclasses say what is logged.

    Errors before the first step are raised, when nothing is lost yet; later ones are warned of and that measurement is
    left out.
    """

    def __init__(
        self, probe: Probe | int | None = None, every_n_steps: int | None = None, max_overhead: float = 0.03
    ) -> None:
        self.probe = probe if isinstance(probe, Probe) else Probe() if probe is None else Probe(size=probe)
        self.every_n_steps = every_n_steps
        self.max_overhead = max_overhead
        self._schedule = Schedule(every_n_steps, max_overhead)
        self._kernel: ProbeKernel | None = None
        self._restored: dict[str, Any] = {}
        self._last_step: int | None = None
        self._measurements = 0

    @property
    def _settings(self) -> tuple[object, ...]:
        return *self.probe.key, self.every_n_steps, self.max_overhead

    @abstractmethod
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int, *, picture: bool) -> None:
        """Log what this monitor is for; draw only if ``picture``."""

    def forget(self) -> None:
        """Begin anew: the callback is used for another run."""
        self._restored, self._last_step, self._measurements = {}, None, 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"{type(self).__name__}: {type(trainer.strategy).__name__} shards the parameters, and a kernel needs all of them on one "
                "device; use a single device or DDP"
            )
        if not trainer.loggers:
            rank_zero_warn(
                f"{type(self).__name__}: the trainer has no logger, so nothing will be drawn; values still reach "
                "trainer.callback_metrics. Pass Trainer(logger=TensorBoardLogger('runs')) to see them"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._last_step is not None and trainer.global_step < self._last_step:
            self.forget()
        peers = [c for c in trainer.callbacks if isinstance(c, KernelMonitor) and c._settings == self._settings]  # type: ignore[attr-defined]
        if peers[0] is self:
            stored = next(
                (peer._restored["inputs"] for peer in peers if peer._restored.get("inputs") is not None), None
            )
            inputs = self.probe.collect(trainer) if stored is None else stored
            precision = cast("Precision", self._restored.get("precision", "fast"))
            self._kernel = ProbeKernel(self.probe, inputs, self._schedule, precision)
            self._schedule.begin(trainer.global_step)
            log_layout(trainer)
            if sample_count(inputs) < 2:
                raise MisconfigurationException(
                    "Probe: the training set has a single sample; a kernel needs at least 2"
                )
        else:
            self._kernel = peers[0]._kernel
        if self._last_step is None or (trainer.global_step != self._last_step and self._is_due(trainer)):
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Under gradient accumulation several batches share one step.
        if self._kernel is not None and trainer.global_step != self._last_step and self._is_due(trainer):
            self._measure_or_warn(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kernel is not None and trainer.global_step != self._last_step:
            self._measure_or_warn(trainer, pl_module, last=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._kernel is not None:
            self._restored = self.state_dict()  # a further fit goes on with the same probe
            self._kernel = None

    def _is_due(self, trainer: pl.Trainer) -> bool:
        assert self._kernel is not None
        return self._kernel.due(trainer.global_step, trainer)

    def _measure_or_warn(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        try:
            self._measure(trainer, pl_module, last=last)
        except Exception as error:
            self._last_step = trainer.global_step
            rank_zero_warn(f"{type(self).__name__}: no measurement at step {trainer.global_step}: {error}")

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        assert self._kernel is not None
        start, step = time.perf_counter(), trainer.global_step
        gram, spectrum = self._kernel.at(step, pl_module)
        # A picture costs more than a small kernel: at measurements 1, 4, 16, 64, ... and at the last one.
        self._measurements += 1
        power_of_two = self._measurements.bit_count() == 1
        picture = last or (power_of_two and self._measurements.bit_length() % 2 == 1)
        self.record(trainer, gram, spectrum, step, picture=picture)
        self._last_step = step
        self._kernel.schedule.spend(step, time.perf_counter() - start)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._kernel is None:
            return dict(self._restored)
        leads = self._kernel.schedule is self._schedule
        return {
            # One of the callbacks that share a probe carries the samples.
            "inputs": self._kernel.inputs if leads else None,
            "precision": str(self._kernel.precision),
            "last_step": self._last_step,
            "measurements": self._measurements,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)
        self._last_step = state_dict.get("last_step")
        self._measurements = int(state_dict.get("measurements", 0))


def gram_state(gram: KernelGram) -> dict[str, Any]:
    """A Gram matrix as plain types, for a checkpoint."""
    return {
        "matrix": gram.matrix.cpu(),
        "outputs": str(gram.outputs),
        "n_samples": gram.n_samples,
        "n_outputs": gram.n_outputs,
        "precision": str(gram.precision),
        "batch_norm": str(gram.batch_norm),
        "floor": gram.floor,
        "jacobian_error": gram.jacobian_error,
        "structured": list(gram.structured),
        "general": list(gram.general),
        "seconds": gram.seconds,
    }


def gram_from_state(state: dict[str, Any]) -> KernelGram:
    """The inverse of ``gram_state``."""
    matrix: torch.Tensor = state["matrix"]
    rest = {name: value for name, value in state.items() if name != "matrix"}
    rest |= {"structured": tuple(state["structured"]), "general": tuple(state["general"])}
    return KernelGram(matrix=matrix, **rest)
