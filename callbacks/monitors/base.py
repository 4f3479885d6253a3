"""``KernelMonitor``: when a monitor measures, what it keeps, and how it never ends a run by an error."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.monitors.beginning import Beginning
from lightning_conv.callbacks.monitors.by_optimizer import OnError
from lightning_conv.callbacks.monitors.figure_turns import FigureTurns
from lightning_conv.callbacks.run.beginning import reads_samples
from lightning_conv.callbacks.run.callbacks import averaged_before, callbacks_of
from lightning_conv.callbacks.run.guarded import Failures, guarded
from lightning_conv.callbacks.run.logging import (
    log_figure,
    log_metrics,
    publish,
    warn_of_early_stopping,
    warn_without_logger,
    withdraw,
)
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.measuring import measuring
from lightning_conv.callbacks.run.network import is_lazy
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.ranks import require_whole_copies
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.losses.per_sample import require_loss

__all__ = ["KernelMonitor", "OnError"]

Wait: TypeAlias = Literal["batch", "step"]


class KernelMonitor(Beginning):
    """Base of the monitors: measures at the first step, when due, and at the last step; subclasses say what is logged.

    The first measurement is made when the fit begins. Where the samples cannot be read one by one (iterable data, several loaders), it is
    made before the first step, on the first batch, and where parameters have no shape yet, after that step.

    A network that cannot be measured raises before the first step, as nothing is lost yet, unless ``on_error`` says otherwise. A later
    error is a warning, the first time, and that measurement is left out: in ``trainer.callback_metrics`` its numbers become NaN, so that
    EarlyStopping and ModelCheckpoint read no old ones. A failed measurement counts for ``max_overhead`` like any other, and the pause
    after it is twice as long each time. On SIGTERM a measurement stops at once, and Lightning ends the run after the next batch.

    With ``Trainer(fast_dev_run=True)`` nothing is logged, but two samples are measured, so that what cannot be measured is said there.

    In a run with several optimizers there is a network for each of them, see ``ByOptimizer``. All tags have its name behind their group.
    """

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(probe, every_n_steps, max_overhead, on_error)
        self._shown: frozenset[str] = frozenset()  # those of ``once`` that were logged in this fit
        self._own: float | None = None  # seconds that ``record`` takes, as predicted
        self._figures = FigureTurns()
        self._now: tuple[int, bool, float] = (
            0,
            False,
            0.0,
        )  # step of this measurement, whether it is the last one, and when it began
        self._waits: Wait | None = None  # for what the first measurement waits
        self.rests_until = 0.0

    rests_until: float
    """A moment (``time.monotonic``) before which the hooks of a batch have nothing to do: what most of them look at, and nothing else."""

    once: frozenset[str] = frozenset()
    """Scalars that stay the same during a run. Loggers get them at the first measurement of a fit, also in a resumed run, whose loggers may
    be different ones, and TensorBoard as settings when the fit ends; ``trainer.callback_metrics`` gets them at every measurement."""

    @abstractmethod
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        """Return the scalars of a measurement; text and histograms are logged here."""

    @abstractmethod
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        """Log the figures of a measurement, each by ``show``."""

    def show(self, trainer: pl.Trainer, tag: str, draw: Callable[[], Figure]) -> bool:
        """Log a figure if it is due and the run can afford it (``FigureTurns``), and return whether it was.

        Args:
            trainer: Trainer of the run.
            tag: Its tag in a run with one optimizer.
            draw: Draws it.
        """
        if not self.may_show(tag):
            return False
        step = self._now[0]
        self._figures.draw(tag, step, lambda: log_figure(trainer, self.tag(tag), draw, step))
        return True

    def may_show(self, tag: str) -> bool:
        """Return whether a figure would be logged now.

        Args:
            tag: Its tag in a run with one optimizer.
        """
        assert self._kernel is not None
        step, last, begun = self._now
        since = time.perf_counter() - begun
        return self._figures.may(tag, self._kernel.schedule, self._share, step, last=last, since=since)

    @override
    def forget(self) -> None:
        """Forget the last run: the callback is used for another one."""
        self._restored, self._last_step, self._metrics = {}, None, {}
        self._figures, self.failed, self.failures, self.measured = FigureTurns(), [], Failures(), ""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for each in self.by_optimizer.values():
            if each._kernel is not None:  # the last run ended in an error, after which there is no teardown
                each._restored, each._kernel = each.state_dict(), None
        if self.loss_fn is not None:
            try:
                require_loss(self.loss_fn)
            except TypeError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        require_whole_copies(trainer, type(self).__name__)
        warn_without_logger(trainer, self, "values")
        warn_of_early_stopping(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_log(trainer)
        # Those that share a kernel with this one must be known, too.
        for monitor in callbacks_of(trainer, Beginning):  # type: ignore[type-abstract]
            monitor._divide(trainer)
        self._shown, self._waits, self._own, self.rests_until = frozenset(), None, None, 0.0
        self._figures.begin()
        if is_lazy(pl_module):
            self._waits = "step"
        elif not reads_samples(trainer):
            self._waits = "batch"
        else:
            self._begin(trainer, pl_module)
        self._hand_on("on_train_start", trainer, pl_module)
        self._require_one(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() < self.rests_until:
            return
        if self._waits == "batch":
            self._waits = None
            self._begin(trainer, pl_module, batch)
        if self._kernel is not None and self._leads:
            self._kernel.probe_loss.before_batch(batch, batch_idx)
        if self._others:
            self._hand_on("on_train_batch_start", trainer, pl_module, batch, batch_idx)
            self._require_one(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._kernel is not None and self._leads:
            self._kernel.probe_loss.before_step(pl_module)
        if self._others:
            self._hand_on("on_before_optimizer_step", trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() < self.rests_until:
            return
        if self._waits == "step" and not is_lazy(pl_module):
            self._waits = None
            self._begin(trainer, pl_module, batch if not reads_samples(trainer) else None)
        # Under gradient accumulation several batches share one step.
        waits = self._kernel is None or trainer.global_step == self._last_step or not self._is_due(trainer)
        if not waits and not self._is_too_dear(trainer.global_step):
            self._measure_or_warn(trainer, pl_module)
        self._hand_on("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)
        self.rests_until = self._next_look()

    def _next_look(self) -> float:
        """Return the moment before which no batch has anything to do, 0 if the next one has."""
        if self._waits is not None or self._others:
            return 0.0
        if self._kernel is None:
            return math.inf
        return 0.0 if self._leads and self._kernel.probe_loss.compares else self._kernel.rests_until

    @property
    def has_begun(self) -> bool:
        """Whether the first measurement waits for no batch and no step, of any of the run's optimizers."""
        return all(each._waits is None for each in self._all)

    @property
    def kernel(self) -> Measurement | None:
        """What is measured, shared by monitors of equal settings; None: nothing is, now."""
        return self._kernel

    @property
    def notes_steps(self) -> bool:
        """Whether ``on_before_optimizer_step`` has anything to do before ``rests_until``."""
        return self._next_look() == 0.0

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module)
        self._hand_on("on_train_end", trainer, pl_module)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        failed = trainer.global_step in self.failed[-1:]
        if self._kernel is None or failed or self._is_too_dear(trainer.global_step):
            return
        is_known = self._last_step == trainer.global_step
        if not is_known and (averaging := averaged_before(trainer, self)):
            if self._leads:
                rank_zero_info(
                    f"{self._name}: the last step is not measured, as {averaging} has put averaged weights in the place of those of the "
                    "run; put it behind this callback in the trainer's list"
                )
        elif is_known or self._kernel.ends(trainer.global_step):
            self._measure_or_warn(trainer, pl_module, last=True)
        elif self._leads:
            rank_zero_info(
                f"{self._name}: the last step is not measured, as that takes about {self._schedule.cost:.2g} s and the run is too "
                "short for it; every_n_steps= asks for it"
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._hand_on("teardown", trainer, pl_module, stage)
        if stage == "fit" and self._kernel is not None:
            self._restored = self.state_dict()  # a further fit goes on with the same probe
            self._kernel = None
        if stage == "fit":
            self.end_log(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.end_log(trainer, pl_module, succeeded=False)

    @override
    def _measure_or_warn(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        assert self._kernel is not None
        if trainer.received_sigterm:
            return
        begun, step = time.perf_counter(), trainer.global_step
        what = f"{self._name}: no measurement"
        with measuring(trainer), guarded(step, what, failures=self.failures) as attempt:
            self._measure(trainer, pl_module, last=last)
        if attempt.failed:
            self._last_step, self.failed = step, [*self.failed, step]
            withdraw(trainer, self._tagged(self._metrics))
            self._metrics = dict.fromkeys(self._metrics, math.nan)
            self._kernel.schedule.spend(step, time.perf_counter() - begun)
            self._kernel.schedule.back_off(len(self.failed))
            if self.on_error == "disable":
                self._kernel = None

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last: bool = False) -> None:
        assert self._kernel is not None
        start, step = time.perf_counter(), trainer.global_step
        gram, spectrum = self._kernel.at(step)
        kernel_seconds = time.perf_counter() - start
        if step != self._last_step:
            self._metrics = self.record(trainer, gram, spectrum, step)
            once = {self.tag(name) for name in self.once}
            log_metrics(trainer, self._tagged(self._without(self._shown)), step, fixed=once)
            self._shown |= self.once & self._metrics.keys()
            publish(trainer, self._tagged(self._metrics))
            self._last_step, self.measured = step, self._kernel.words(self.loss_fn)
            self._kernel.schedule.note(step, time.perf_counter() - start - kernel_seconds)
        self._now = step, last, start
        self.draw(trainer, gram, spectrum, step)
        self._kernel.schedule.spend(step, time.perf_counter() - start)

    @override
    def _own_state(self) -> dict[str, Any]:
        state = super()._own_state()
        return state if self._kernel is None else state | {"figures": self._figures.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._figures.load_state_dict(state_dict.get("figures", {}))

    @property
    def steps_of_values(self) -> dict[str, int]:
        """The optimizer steps at which the values that are logged now were measured, by tag."""
        step = self._last_step
        return {} if step is None else dict.fromkeys(self._tagged(self._metrics), step)

    def _without(self, names: frozenset[str]) -> dict[str, float]:
        return {name: value for name, value in self._metrics.items() if name not in names}
