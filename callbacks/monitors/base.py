"""``KernelMonitor``: when a monitor measures, what it keeps, and how it never ends a run by an error."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_conv.callbacks.run import budget
from lightning_conv.callbacks.run.beginning import cannot_measure, measurement_of, reads_samples, two_samples_of
from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.guarded import Failures, guarded
from lightning_conv.callbacks.run.logging import (
    log_layout,
    log_metrics,
    publish,
    warn_of_early_stopping,
    warn_without_logger,
    withdraw,
)
from lightning_conv.callbacks.run.loss import LossFn
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.network import is_lazy
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.callbacks.run.until_sigterm import until_sigterm
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.machine.gemm import keep_product, product_name

OnError: TypeAlias = Literal["raise", "warn", "disable"]

Wait: TypeAlias = Literal["batch", "step"]


class KernelMonitor(pl.Callback):
    """Base of the monitors: measures at the first step, when due, and at the last step; subclasses say what is logged.

    The first measurement is made when the fit begins. Where the samples cannot be read one by one (iterable data, several loaders), it is
    made before the first step, on the first batch, and where parameters have no shape yet, after that step.

    A network that cannot be measured raises before the first step, as nothing is lost yet, unless ``on_error`` says otherwise. A later
    error is a warning, the first time, and that measurement is left out: in ``trainer.callback_metrics`` its numbers become NaN, so that
    EarlyStopping and ModelCheckpoint read no old ones. A failed measurement counts for ``max_overhead`` like any other, and the pause
    after it is twice as long each time. On SIGTERM a measurement stops at once, and Lightning ends the run after the next batch.

    With ``Trainer(fast_dev_run=True)`` nothing is logged, but two samples are measured, so that what cannot be measured is said there.

    Attributes:
        failed: Steps of this run whose measurement failed.
        failures: Why, each reason once, of all monitors that share a kernel.
        measured: What is measured, in words: the network, the loss of the training step, and how they were found; empty before the first
            measurement.
    """

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        on_error: OnError = "raise",
    ) -> None:
        if on_error not in get_args(OnError):
            raise MisconfigurationException(
                f"{type(self).__name__}: on_error={on_error!r} is not one of {', '.join(get_args(OnError))}"
            )
        self.on_error: OnError = on_error
        self.probe = probe if isinstance(probe, Probe) else Probe() if probe is None else Probe(size=probe)
        self.every_n_steps = every_n_steps
        self.max_overhead = max_overhead
        self._schedule = Schedule(every_n_steps, max_overhead)
        self._kernel: Measurement | None = None
        self._restored: dict[str, Any] = {}
        self._last_step: int | None = None
        self._metrics: dict[str, float] = {}
        self._shown: frozenset[str] = frozenset()  # those of ``once`` that were logged in this fit
        self._own: float | None = None  # seconds that ``record`` takes, as predicted
        self._drawn: tuple[int, float, float] | None = None  # step, time of day, and seconds that drawing took
        self._loaded = False  # whether the state comes from a checkpoint, for the run that begins next
        self.failed: list[int] = []
        self.failures = Failures()  # shared by those that share a kernel
        self.measured = ""
        self._waits: Wait | None = None  # for what the first measurement waits

    @property
    def _settings(self) -> tuple[object, ...]:
        loss = self.loss_fn if self.probe.outputs == "loss" else None  # the kernel depends on it
        return *self.probe.key, self.every_n_steps, self.max_overhead, self.on_error, loss

    loss_fn: LossFn | None = None  # of the training step, as the user has said it

    once: frozenset[str] = frozenset()
    """Scalars that stay the same during a run. Loggers get them at the first measurement of a fit, also in a resumed run, whose loggers may
    be different ones; ``trainer.callback_metrics`` gets them at every measurement."""

    @property
    def wants_layers(self) -> bool:
        """Whether this monitor needs each layer's own kernel."""
        return False

    def own_seconds(self, kernel: Measurement) -> float:
        """Return about how long ``record`` takes beside the kernel; 0: not worth counting."""
        return 0.0

    def wait(self, trainer: pl.Trainer, kernel: Measurement) -> None:
        """Note what must be known of the start, where the first measurement waits until the budget allows for it."""

    @abstractmethod
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        """Return the scalars of a measurement; text and histograms are logged here."""

    @abstractmethod
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        """Log the figures of a measurement."""

    def forget(self) -> None:
        """Forget the last run: the callback is used for another one."""
        self._restored, self._last_step, self._metrics = {}, None, {}
        self._drawn, self.failed, self.failures, self.measured = None, [], Failures(), ""

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
        self._shown, self._waits, self._own = frozenset(), None, None
        if is_lazy(pl_module):
            self._waits = "step"
        elif not reads_samples(trainer):
            self._waits = "batch"
        else:
            self._begin(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._waits == "batch":
            self._waits = None
            self._begin(trainer, pl_module, batch)
        if self._kernel is not None and self._leads:
            self._kernel.probe_loss.before_batch(batch, batch_idx)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kernel is not None and self._leads:
            self._kernel.probe_loss.after_backward(pl_module)

    @property
    def _leads(self) -> bool:
        """Whether this monitor is the one that made the measurement which others share."""
        return self._kernel is not None and self._kernel.schedule is self._schedule

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        """Make the first measurement of a fit; with ``fast_dev_run`` one of two samples, which is not kept."""
        if trainer.received_sigterm:
            return
        # What reading and observing fail by is the user's code: any error.
        with until_sigterm(trainer), self._first(trainer, pl_module, batch):
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                measurement_of(trainer, pl_module, two_samples_of(self.probe), Schedule(1, 1.0), batch=batch).at(
                    0, pl_module
                )
                return
            monitors = callbacks_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
            peers = [monitor for monitor in monitors if monitor._settings == self._settings]
            if peers[0] is self:
                for peer in peers:
                    peer._forget_another_run(trainer)
                self._lead(trainer, pl_module, peers, batch)
            else:
                self._kernel = peers[0]._kernel
                self._say_what_is_measured(unless=peers[0].measured)
            self._loaded = False
            if self._kernel is not None and not self._kernel.awaited and self._is_first_due(trainer):
                self._kernel.at(trainer.global_step, pl_module)
        if self._kernel is None or trainer.received_sigterm:
            return
        if self._is_too_dear():
            self.wait(trainer, self._kernel)
            if self._kernel.awaited == 0 or self._kernel.schedule is self._schedule:
                rank_zero_info(self._why_it_waits())
        elif self._is_first_due(trainer):
            self._measure_or_warn(trainer, pl_module)
        else:
            # In a resumed run EarlyStopping or ModelCheckpoint may read values before the next measurement.
            publish(trainer, self._metrics)

    def _is_too_dear(self) -> bool:
        """Return whether the first measurement of this callback takes longer than the budget allows now."""
        if self._kernel is None or self.every_n_steps is not None or self._last_step is not None:
            return False
        kernel, own = self._kernel, self._own_seconds
        if kernel.awaited:
            return kernel.decided(kernel.awaited + own > kernel.schedule.left())
        # What a last measurement takes is provided for.
        return own > 0 and kernel.decided(not kernel.schedule.allows(2 * own + kernel.schedule.cost))

    @property
    def _own_seconds(self) -> float:
        assert self._kernel is not None
        if self._own is None:
            self._own = self.own_seconds(self._kernel)
        return self._own

    def _why_it_waits(self) -> str:
        assert self._kernel is not None
        awaited = self._kernel.awaited
        what = (
            f"the first measurement takes about {awaited:.2g} s, and"
            if awaited
            else f"a measurement takes about {self._own_seconds:.2g} s beside the kernel; the first one"
        )
        return (
            f"{type(self).__name__}: {what} waits until that is {self.max_overhead:.0%} of the time of training; every_n_steps= asks for "
            "it at once"
        )

    def _is_first_due(self, trainer: pl.Trainer) -> bool:
        return self._last_step is None or (trainer.global_step != self._last_step and self._is_due(trainer))

    def _forget_another_run(self, trainer: pl.Trainer) -> None:
        """Forget the last run if another one begins: at step 0, before the last known step, or from a checkpoint without our state."""
        back = self._last_step is not None and trainer.global_step < self._last_step
        if not self._loaded and (trainer.global_step == 0 or back or trainer.ckpt_path is not None):
            self.forget()

    def _lead(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, peers: Sequence[KernelMonitor], batch: Any
    ) -> None:
        """Make the measurement that all monitors with equal settings share."""
        # Any of them may have carried the samples in the checkpoint: the order of the callbacks may have changed.
        stored = next((peer._restored for peer in peers if peer._restored.get("inputs") is not None), {})
        per_layer = any(peer.wants_layers for peer in peers)
        for peer in peers:
            peer.failures = self.failures
        begun = time.perf_counter()
        self._schedule.begin(trainer.global_step)
        found = measurement_of(
            trainer,
            pl_module,
            self.probe,
            self._schedule,
            batch=batch,
            stored=stored,
            per_layer=per_layer,
            loss_fn=next((peer.loss_fn for peer in peers if peer.loss_fn is not None), None),
        )
        self._kernel = found
        self._say_what_is_measured()
        if self.every_n_steps is None and not stored and {"size", "outputs"} - self.probe.given:
            self._choose(trainer, found, time.perf_counter() - begun)
            self.measured = found.words(self.loss_fn)
        self._schedule.spend(trainer.global_step, time.perf_counter() - begun)
        log_layout(trainer)

    def _choose(self, trainer: pl.Trainer, found: Measurement, spent: float) -> None:
        """Choose what is measured within the budget; a choice that is interrupted is not kept."""
        try:
            chosen = budget.fit_to_budget(trainer, found, self.max_overhead, spent)
        except (KeyboardInterrupt, SystemExit):
            self._kernel = None
            raise
        if chosen.is_reduced:
            rank_zero_info(f"{type(self).__name__}: {chosen.words}")

    def _say_what_is_measured(self, unless: str = "") -> None:
        """Say which network and which loss are measured, unless another monitor has said the same."""
        if self._kernel is not None:
            self.measured = self._kernel.words(self.loss_fn)
            if self.measured != unless:
                rank_zero_info(f"{type(self).__name__}: {self.measured}")

    @contextmanager
    def _first(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Iterator[None]:
        """Say what keeps the first measurement from being made, and how to help, as ``on_error`` asks."""
        try:
            yield
        except Exception as error:  # anything that a user's module raises
            message = cannot_measure(trainer, self, error, self.probe, batch)
            if self.on_error == "raise" and trainer.global_step == 0:
                self._kernel = None
                raise MisconfigurationException(message) from error
            if self._kernel is None or self.on_error == "disable":
                self._kernel, message = None, f"{message}. Nothing is measured"
            rank_zero_warn(message)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._waits == "step" and not is_lazy(pl_module):
            self._waits = None
            self._begin(trainer, pl_module, batch if not reads_samples(trainer) else None)
        # Under gradient accumulation several batches share one step.
        if self._kernel is None or trainer.global_step == self._last_step or not self._is_due(trainer):
            return
        if not self._is_too_dear():
            self._measure_or_warn(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        failed = trainer.global_step in self.failed[-1:]
        if self._kernel is None or failed or self._is_too_dear():
            return
        if self._last_step == trainer.global_step or self._kernel.ends(trainer.global_step):
            self._measure_or_warn(trainer, pl_module, last=True)
        elif self._kernel.schedule is self._schedule:
            rank_zero_info(
                f"{type(self).__name__}: the last step is not measured, as that takes about {self._schedule.cost:.2g} s and the run is too "
                "short for it; every_n_steps= asks for it"
            )

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
        if trainer.received_sigterm:
            return
        begun, step = time.perf_counter(), trainer.global_step
        what = f"{type(self).__name__}: no measurement"
        with until_sigterm(trainer), guarded(step, what, failures=self.failures) as attempt:
            self._measure(trainer, pl_module, last=last)
        if attempt.failed:
            self._last_step, self.failed = step, [*self.failed, step]
            self._metrics = withdraw(trainer, self._metrics)
            self._kernel.schedule.spend(step, time.perf_counter() - begun)
            self._kernel.schedule.back_off(len(self.failed))
            if self.on_error == "disable":
                self._kernel = None

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        assert self._kernel is not None
        start, step = time.perf_counter(), trainer.global_step
        gram, spectrum = self._kernel.at(step, pl_module)
        kernel_seconds = time.perf_counter() - start
        if step != self._last_step:
            self._metrics = self.record(trainer, gram, spectrum, step)
            log_metrics(trainer, {name: v for name, v in self._metrics.items() if name not in self._shown}, step)
            self._shown |= self.once & self._metrics.keys()
            publish(trainer, self._metrics)
            self._last_step = step
            self._kernel.schedule.note(step, time.perf_counter() - start - kernel_seconds)
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
        leads = self._leads
        return {
            # Of the callbacks that share a probe, one carries the samples.
            "inputs": self._kernel.inputs if leads else None,
            "targets": self._kernel.targets if leads else None,
            "parameters": list(self._kernel.parameters),
            "outputs": self._kernel.probe.outputs,
            "loss_changed": self._kernel.probe_loss.changed,
            "highest": str(self._kernel.highest),
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
