"""``Beginning``: how a monitor makes its first measurement of a fit, and what it says where it cannot."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.monitors.kept import Kept
from lightning_conv.callbacks.run import budget
from lightning_conv.callbacks.run.beginning import cannot_measure, measurement_of, two_samples_of
from lightning_conv.callbacks.run.logging import publish
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.measuring import measuring
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.callbacks.run.sharded import failing_together
from lightning_conv.callbacks.run.step.seeking import NotObservedError

NOTHING = "Nothing is measured"
"""How the warning ends that a monitor with ``on_error="warn"`` or ``"disable"`` gives where it cannot measure."""


class Beginning(Kept):
    """Base of ``KernelMonitor``: makes the first measurement of a fit, which monitors with equal settings share.

    Where the run has several optimizers, one whose network cannot be measured is left out with a warning, unless it is so for all of them.
    """

    _own: float | None = None  # seconds that ``record`` takes, as predicted

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
    def _measure_or_warn(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None: ...

    def _require_one(self, trainer: pl.Trainer) -> None:
        """Refuse a run in which the network of no optimizer can be measured; where one can, the others are left out with a warning.

        Raises:
            MisconfigurationException: There are several optimizers, none has a network, and ``on_error`` asks for it.
        """
        unseen = [each._unseen for each in self._all]
        if self._others and unseen[0] is not None and all(unseen):
            with self._first(trainer, None, alone=True):
                raise unseen[0]

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        """Make the first measurement of a fit; with ``fast_dev_run`` one of two samples, which is not kept."""
        if trainer.received_sigterm:
            return
        # What reading and observing fail by is the user's code: any error.
        with measuring(trainer), self._first(trainer, batch), failing_together(trainer):
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                two, schedule = two_samples_of(self.probe), Schedule(1, 1.0)
                measurement_of(trainer, two, schedule, batch=batch, bound=self.bound).at(0)
                return
            monitors = monitors_of(trainer, Beginning)  # type: ignore[type-abstract]
            peers = [monitor for monitor in monitors if monitor._settings == self._settings]
            if peers[0] is self:
                for peer in peers:
                    peer._forget_another_run(trainer)
                self._lead(trainer, peers, batch)
            else:
                self._kernel, self.measured = peers[0]._kernel, peers[0].measured
                self._say_what_is_measured(unless=peers[0].measured)
            self._loaded = False
            if self._kernel is not None and not self._kernel.awaited and self._is_first_due(trainer):
                self._kernel.at(trainer.global_step)
        if self._kernel is None or trainer.received_sigterm:
            return
        if self._is_too_dear(trainer.global_step):
            self.wait(trainer, self._kernel)
            if self._kernel.awaited == 0 or self._leads:
                rank_zero_info(self._why_it_waits())
        elif self._is_first_due(trainer):
            self._measure_or_warn(trainer, pl_module)
        else:
            # In a resumed run EarlyStopping or ModelCheckpoint may read values before the next measurement.
            publish(trainer, self._tagged(self._metrics))

    def _is_too_dear(self, step: int) -> bool:
        """Return whether the first measurement of this callback takes longer than the budget allows now."""
        if self._kernel is None or self.every_n_steps is not None or self._last_step is not None:
            return False
        kernel, own = self._kernel, self._own_seconds
        if kernel.awaited:
            return kernel.decisions.alike(kernel.awaited + own > kernel.schedule.left(step))
        # What a last measurement takes is provided for.
        return own > 0 and kernel.decisions.alike(not kernel.schedule.allows(2 * own + kernel.schedule.cost, step))

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
        return f"{self._name}: {what} waits until that is {self._share:.0%} of the time of training; every_n_steps= asks for it at once"

    def _is_due(self, trainer: pl.Trainer) -> bool:
        assert self._kernel is not None
        return self._kernel.due(trainer.global_step)

    def _is_first_due(self, trainer: pl.Trainer) -> bool:
        return self._last_step is None or (trainer.global_step != self._last_step and self._is_due(trainer))

    def _forget_another_run(self, trainer: pl.Trainer) -> None:
        """Forget the last run if another one begins: at step 0, before the last known step, or from a checkpoint without our state."""
        back = self._last_step is not None and trainer.global_step < self._last_step
        if not self._loaded and (trainer.global_step == 0 or back or trainer.ckpt_path is not None):
            self.forget()

    def _lead(self, trainer: pl.Trainer, peers: Sequence[Beginning], batch: Any) -> None:
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
            self.probe,
            self._schedule,
            batch=batch,
            stored=stored,
            per_layer=per_layer,
            loss_fn=next((peer.loss_fn for peer in peers if peer.loss_fn is not None), None),
            bound=self.bound,
        )
        self._kernel = found
        self._say_what_is_measured()
        if self.every_n_steps is None and not stored and {"size", "outputs"} - self.probe.given:
            self._choose(trainer, found, time.perf_counter() - begun)
            self.measured = found.words(self.loss_fn)
        self._schedule.spend(trainer.global_step, time.perf_counter() - begun)

    def _choose(self, trainer: pl.Trainer, found: Measurement, spent: float) -> None:
        """Choose what is measured within the budget; a choice that is interrupted is not kept."""
        try:
            chosen = budget.fit_to_budget(trainer, found, self.max_overhead, spent, self._parts)
        except (KeyboardInterrupt, SystemExit):
            self._kernel = None
            raise
        if chosen.is_reduced:
            found.choice = chosen.words
            rank_zero_info(f"{self._name}: {chosen.words}")

    def _say_what_is_measured(self, unless: str = "") -> None:
        """Say which network and which loss are measured, unless another monitor has said the same."""
        if self._kernel is not None:
            self.measured = self._kernel.words(self.loss_fn)
            if self.measured != unless:
                rank_zero_info(f"{type(self).__name__}: {self.measured}")

    @contextmanager
    def _first(self, trainer: pl.Trainer, batch: Any, *, alone: bool = False) -> Iterator[None]:
        """Say what keeps the first measurement from being made, and how to help, as ``on_error`` asks.

        Of several optimizers the one that fails is left out; ``alone``: it is not.

        Raises:
            MisconfigurationException: It is before the first step, and ``on_error`` asks for it.
        """
        self._unseen = None
        try:
            yield
        except Exception as error:  # anything that a user's module raises
            ends = self.on_error == "raise" and trainer.global_step == 0
            unseen = isinstance(error, NotObservedError)
            left_out = self._parts > 1 and not alone and (ends or unseen)
            message = str(error) if left_out and unseen else cannot_measure(trainer, self, error, self.probe, batch)
            if left_out:
                self._kernel, self._unseen = None, error
                self.measured = f"nothing is measured of {self.optimizer}: {message}"
                rank_zero_warn(f"{type(self).__name__}: {self.measured}")
                return
            if ends:
                self._kernel = None
                raise MisconfigurationException(message) from error
            if self._kernel is None or self.on_error == "disable":
                self._kernel, message = None, f"{message}. {NOTHING}"
            rank_zero_warn(message)
