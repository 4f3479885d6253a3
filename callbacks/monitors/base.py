"""``KernelMonitor``: when a monitor measures, what it keeps, and how it never ends a run by an error."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.logging import (
    log_layout,
    log_metrics,
    publish,
    warn_of_early_stopping,
    warn_without_logger,
    withdraw,
)
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.probe import Probe, cannot_call
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.machine.gemm import keep_product, product_name
from lightning_conv.networks.evaluation import sample_count


class KernelMonitor(pl.Callback):
    """Base of the monitors: measures at the first step, when due, and at the last step; subclasses say what is logged.

    Errors before the first step are raised, as nothing is lost yet. A later error is a warning, the first time, and that measurement
    is left out: in ``trainer.callback_metrics`` its numbers become NaN, so that EarlyStopping and ModelCheckpoint read no old ones.
    A failed measurement counts for ``max_overhead`` like any other.

    Attributes:
        failed: Steps of this run whose measurement failed.
    """

    def __init__(
        self, probe: Probe | int | None = None, every_n_steps: int | None = None, max_overhead: float = 0.03
    ) -> None:
        self.probe = probe if isinstance(probe, Probe) else Probe() if probe is None else Probe(size=probe)
        self.every_n_steps = every_n_steps
        self.max_overhead = max_overhead
        self._schedule = Schedule(every_n_steps, max_overhead)
        self._kernel: Measurement | None = None
        self._restored: dict[str, Any] = {}
        self._last_step: int | None = None
        self._metrics: dict[str, float] = {}
        self._shown: frozenset[str] = frozenset()  # those of ``once`` that were logged in this fit
        self._drawn: tuple[int, float, float] | None = None  # step, time of day, and seconds that drawing took
        self._loaded = False  # whether the state comes from a checkpoint, for the run that begins next
        self.failed: list[int] = []

    @property
    def _settings(self) -> tuple[object, ...]:
        return *self.probe.key, self.every_n_steps, self.max_overhead

    once: frozenset[str] = frozenset()
    """Scalars that stay the same during a run. Loggers get them at the first measurement of a fit, also in a resumed run, whose loggers may
    be different ones; ``trainer.callback_metrics`` gets them at every measurement."""

    @property
    def wants_layers(self) -> bool:
        """Whether this monitor needs each layer's own kernel."""
        return False

    @abstractmethod
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        """Return the scalars of a measurement; text and histograms are logged here."""

    @abstractmethod
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        """Log the figures of a measurement."""

    def forget(self) -> None:
        """Forget the last run: the callback is used for another one."""
        self._restored, self._last_step, self._metrics = {}, None, {}
        self._drawn, self.failed = None, []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._kernel is not None:  # the last run ended in an error, after which there is no teardown
            self._restored, self._kernel = self.state_dict(), None
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"{type(self).__name__}: {type(trainer.strategy).__name__} shards the parameters, and a kernel needs all of them on one "
                "device; use a single device or DDP"
            )
        warn_without_logger(trainer, self, "values")
        warn_of_early_stopping(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown = frozenset()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        monitors = callbacks_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
        peers = [monitor for monitor in monitors if monitor._settings == self._settings]
        if peers[0] is self:
            for peer in peers:
                peer._forget_another_run(trainer)
            self._lead(trainer, pl_module, peers)
        else:
            self._kernel = peers[0]._kernel
        self._loaded = False
        if self._last_step is None or (trainer.global_step != self._last_step and self._is_due(trainer)):
            self._measure_first(trainer, pl_module)
        else:
            # In a resumed run EarlyStopping or ModelCheckpoint may read values before the next measurement.
            publish(trainer, self._metrics)

    def _forget_another_run(self, trainer: pl.Trainer) -> None:
        """Forget the last run if another one begins: at step 0, before the last known step, or from a checkpoint without our state."""
        back = self._last_step is not None and trainer.global_step < self._last_step
        if not self._loaded and (trainer.global_step == 0 or back or trainer.ckpt_path is not None):
            self.forget()

    def _lead(self, trainer: pl.Trainer, pl_module: pl.LightningModule, peers: Sequence[KernelMonitor]) -> None:
        """Make the measurement that all monitors with equal settings share."""
        # Any of them may have carried the samples in the checkpoint: the order of the callbacks may have changed.
        stored = next((peer._restored for peer in peers if peer._restored.get("inputs") is not None), {})
        names = stored["parameters"] if stored else self.probe.parameter_names(pl_module)
        inputs, targets = (stored["inputs"], stored.get("targets")) if stored else self.probe.collect(trainer)
        if sample_count(inputs) < 2:
            raise MisconfigurationException("Probe: the training set has a single sample; a kernel needs at least 2")
        per_layer = any(peer.wants_layers for peer in peers)
        self._kernel = Measurement(self.probe, inputs, targets, names, self._schedule, per_layer=per_layer)
        self._kernel.precision = cast("Precision", stored.get("precision", "fast"))
        self._schedule.begin(trainer.global_step)
        log_layout(trainer)

    def _measure_first(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            self._measure(trainer, pl_module)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MisconfigurationException(
                f"{type(self).__name__}: no room for the kernel ({error}); use fewer samples (Probe(size={self.probe.size // 2})), "
                "fewer outputs or parameters (Probe(outputs=..., parameters=...)), or allow more (Probe(max_memory=...))"
            ) from error
        except (TypeError, NotImplementedError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {cannot_call(pl_module, error)}") from error

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Under gradient accumulation several batches share one step.
        if self._kernel is not None and trainer.global_step != self._last_step and self._is_due(trainer):
            self._measure_or_warn(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kernel is not None:
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
        assert self._kernel is not None
        begun, step = time.perf_counter(), trainer.global_step
        what = f"{type(self).__name__}: no measurement"
        with guarded(step, what, say=None if self.failed else rank_zero_warn) as attempt:
            self._measure(trainer, pl_module, last=last)
        if attempt.failed:
            self._last_step, self.failed = step, [*self.failed, step]
            self._metrics = withdraw(trainer, self._metrics)
            self._kernel.schedule.spend(step, time.perf_counter() - begun)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        assert self._kernel is not None
        start, step = time.perf_counter(), trainer.global_step
        gram, spectrum = self._kernel.at(step, pl_module)
        if step != self._last_step:
            self._metrics = self.record(trainer, gram, spectrum, step)
            log_metrics(trainer, {name: v for name, v in self._metrics.items() if name not in self._shown}, step)
            self._shown |= self.once & self._metrics.keys()
            publish(trainer, self._metrics)
            self._last_step = step
        # A figure costs more than a small kernel: figures get a third of the budget, except the first and the last one.
        before = time.perf_counter()
        if self._drawn is None or (last and self._drawn[0] != step) or self._may_draw(before):
            self.draw(trainer, gram, spectrum, step)
            self._drawn = step, before, time.perf_counter() - before
        self._kernel.schedule.spend(step, time.perf_counter() - start)

    def _may_draw(self, now: float) -> bool:
        return self._drawn is not None and (now - self._drawn[1]) * self.max_overhead / 3 >= self._drawn[2]

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._kernel is None:
            return dict(self._restored)
        leads = self._kernel.schedule is self._schedule
        return {
            # Of the callbacks that share a probe, one carries the samples.
            "inputs": self._kernel.inputs if leads else None,
            "targets": self._kernel.targets if leads else None,
            "parameters": list(self._kernel.parameters),
            "precision": str(self._kernel.precision),
            "product": product_name(),
            "last_step": self._last_step,
            "metrics": dict(self._metrics),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.forget()
        self._restored, self._loaded = dict(state_dict), True
        self._last_step = state_dict.get("last_step")
        keep_product(state_dict.get("product", ""))
        self._metrics = dict(state_dict.get("metrics", {}))
