"""``ByOptimizer``: the settings of a monitor, and one monitor like it for the network of each optimizer of the run."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.guarded import Failures
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.run_log import LogsOfRun
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.callbacks.run.step.optimizers import probe_of_each
from lightning_conv.reporting.tags import tag_of_network

OnError: TypeAlias = Literal["raise", "warn", "disable"]

Monitor = TypeVar("Monitor", bound="ByOptimizer")


class ByOptimizer(LogsOfRun):
    """Base of ``Kept``: the settings of a monitor, and which network it measures.

    A monitor is one of one network. In a run with several optimizers it takes that of the first one, and makes another monitor like itself
    for each of the others, to which it hands its hooks on. Each of them has an equal part of the budget.

    Attributes:
        optimizer: Name of the optimizer whose network is measured; empty in a run with one optimizer.
        failed: Steps of this run whose measurement failed.
        failures: Why, each reason once, of all monitors that share a kernel.
        measured: What is measured, in words: the network, the loss of the training step, and how they were found; empty before the first
            measurement.
    """

    def __init__(
        self, probe: Probe | int | None, every_n_steps: int | None, max_overhead: float, on_error: OnError
    ) -> None:
        if on_error not in get_args(OnError):
            raise MisconfigurationException(
                f"{type(self).__name__}: on_error={on_error!r} is not one of {', '.join(get_args(OnError))}"
            )
        if probe is not None and (isinstance(probe, bool) or not isinstance(probe, (Probe, int))):
            raise MisconfigurationException(
                f"{type(self).__name__}: probe={probe!r}; need a Probe, or a number of samples such as 128"
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
        self._loaded = False  # whether the state comes from a checkpoint, for the run that begins next
        self.failed: list[int] = []
        self.failures = Failures()  # shared by those that share a kernel
        self.measured = ""
        self.optimizer = ""
        self._asked = self.probe  # as the user has given it
        self._others: list[Any] = []  # monitors like this one, for the networks of the other optimizers
        self._parts = 1  # how many networks share the budget
        self._stored: dict[str, dict[str, Any]] = {}  # states of the others in a checkpoint
        self._unseen: Exception | None = None  # why this one of several networks is not measured

    @property
    def by_optimizer(self) -> dict[str, Self]:
        """The monitors of all networks by the name of the optimizer; with one optimizer only this one, under its empty name."""
        return {each.optimizer: each for each in self._all}

    @property
    def last_step(self) -> int | None:
        """Step of the last measurement, a failed one included; None: there was none."""
        return self._last_step

    @property
    def schedule(self) -> Schedule:
        """The time that measuring takes; monitors that share a kernel have one schedule."""
        return self._schedule if self._kernel is None else self._kernel.schedule

    @property
    def _all(self) -> list[Self]:
        return [self, *self._others]

    @abstractmethod
    def forget(self) -> None:
        """Forget the last run: the callback is used for another one."""

    loss_fn: LossFn | None = None  # of the training step, as the user has said it
    bound: tuple[str, ...] | None = (
        None  # patterns of the parameters whose kernel bounds the whole one; None: the whole one is measured
    )

    @property
    def _settings(self) -> tuple[object, ...]:
        loss = self.loss_fn if self.probe.outputs == "loss" else None  # the kernel depends on it
        return *self.probe.key, self.every_n_steps, self.max_overhead, self.on_error, loss, self.bound

    @property
    def _leads(self) -> bool:
        """Whether this monitor is the one that made the measurement which others share."""
        return self._kernel is not None and self._kernel.schedule is self._schedule

    @property
    def _name(self) -> str:
        return f"{type(self).__name__} ({self.optimizer})" if self.optimizer else type(self).__name__

    def tag(self, name: str) -> str:
        """Return a tag with the name of the optimizer behind its group: ``kernel/lambda_min`` as ``kernel/generator/lambda_min``.

        Args:
            name: The tag in a run with one optimizer.
        """
        return tag_of_network(name, self.optimizer)

    def _tagged(self, metrics: dict[str, float]) -> dict[str, float]:
        return {self.tag(name): value for name, value in metrics.items()}

    def _divide(self, trainer: pl.Trainer) -> None:
        """Take the network of the first optimizer, and make a monitor for each of the others; done already, it stays as it is."""
        several = len(trainer.optimizers) > 1
        probes = probe_of_each(trainer, self._asked)
        names = [(each.optimizer or "") if several else "" for each in probes]
        if list(self.by_optimizer) != names or self._parts != len(names):
            if self._restored and self._restored.get("optimizer", "") != names[0]:
                rank_zero_info(f"{self._name}: the state of the checkpoint is of another network; a new one is begun")
                self.forget()
            self.optimizer = names[0]
            self._others = self._monitors_for(names[1:])
            for each in self._all:
                each._parts = len(names)
                each._schedule = Schedule(self.every_n_steps, each._share)
        for each, probe in zip(self._all, probes, strict=True):
            each.probe = probe
            if (state := self._stored.pop(each.optimizer, None)) is not None and each is not self:
                each.load_state_dict(state)

    def _monitors_for(self, optimizers: Sequence[str]) -> list[Self]:
        """Return a monitor like this one for each of some optimizers, those of the last fit where there are."""
        found = {each.optimizer: each for each in self._others}
        for optimizer in optimizers:
            if optimizer not in found:
                found[optimizer] = made = copy.copy(self)
                made._others, made._kernel, made._stored, made._loaded = [], None, {}, False
                made._run_log = None
                made.optimizer = optimizer
                made.forget()
        return [found[optimizer] for optimizer in optimizers]

    @property
    def _share(self) -> float:
        """This network's part of ``max_overhead``."""
        return self.max_overhead / self._parts

    def _hand_on(self, hook: str, *args: Any) -> None:
        """Call a hook of the monitors for the other optimizers."""
        for each in self._others:
            getattr(each, hook)(*args)


def monitors_of(trainer: pl.Trainer, kind: type[Monitor]) -> list[Monitor]:
    """Return the trainer's monitors of one class and its subclasses, in their order, each with those of the other optimizers.

    Args:
        trainer: The trainer.
        kind: The class.
    """
    return [each for monitor in callbacks_of(trainer, kind) for each in monitor.by_optimizer.values()]
