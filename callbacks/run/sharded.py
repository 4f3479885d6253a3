"""Runs whose parameters are divided among processes (``ModelParallelStrategy``): which network is measured there, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_conv.callbacks.run.features import LastFeatures
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.moment import Moment
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.ranks import all_processes
from lightning_conv.kernels.sharded.passes import sharded_outputs
from lightning_conv.losses.gradient import SampleLoss
from lightning_conv.losses.kind import LossFn
from lightning_conv.machine.processes import ProcessesError
from lightning_conv.networks.sharded import get_ready, is_sharded

Seen = TypeVar("Seen")

NO_COPY = "the parameters are sharded, so that no process has a copy of the module"
"""Why the training step is not observed and what needs all weights is not measured."""


def is_sharded_run(trainer: pl.Trainer) -> bool:
    """Return whether the parameters of a run are divided among its processes.

    Args:
        trainer: Trainer of the run.
    """
    return isinstance(trainer.strategy, ModelParallelStrategy) and is_sharded(trainer.lightning_module)


class PartedError(BaseException):
    """A measurement has failed on some processes of a sharded run and not on others, so that their collectives no longer match.

    No handler of errors may go on after it: a training step would take what another process has sent for a measurement.
    """


@contextmanager
def failing_together(trainer: pl.Trainer) -> Iterator[None]:
    """Let an error in this block be that of all processes of a sharded run; in other runs nothing is done.

    Args:
        trainer: Trainer of the run.

    Raises:
        PartedError: It fails on some of them only, or one does not answer in time.
    """
    if not is_sharded_run(trainer):
        yield
        return
    processes, error = all_processes(trainer), None
    try:
        yield
    except Exception as failed:  # of any kind: the forward is the user's
        error = failed
    try:
        found = processes.gather("" if error is None else f"{type(error).__name__}: {error}")
    except ProcessesError as parted:
        raise PartedError(
            f"a measurement of a sharded run: {parted}{'' if error is None else f'; here: {error}'}"
        ) from error
    if error is not None and all(found):
        raise error
    if any(found):
        which = "; ".join(f"process {rank}: {said}" for rank, said in enumerate(found) if said)
        raise PartedError(f"a measurement of a sharded run has failed on some processes only ({which})") from error


def probe_of_sharded(trainer: pl.Trainer, probe: Probe) -> Probe:
    """Return the settings with the network of a sharded run, which no training step on a copy can show: where the user does not say it.

    It is the module's own ``forward``, or its only part with parameters, called on what the batch begins with.

    Args:
        trainer: Trainer of the run; nothing is changed unless it is sharded.
        probe: The settings.

    Raises:
        MisconfigurationException: There are several such parts and no ``forward``, or a bound of some parameters is asked for.
    """
    if not is_sharded_run(trainer):
        return probe
    module = trainer.lightning_module
    get_ready(module)
    if probe.forward_fn is not None or type(module).forward is not pl.LightningModule.forward:
        return probe
    parts = [name for name, part in module.named_children() if next(part.parameters(), None) is not None]
    if len(parts) != 1:
        raise MisconfigurationException(
            f"Probe: {NO_COPY}, and which of {', '.join(parts) or 'its parts'} is the network of {type(module).__name__} is not known; "
            "pass Probe(forward_fn=lambda module, x: ...)"
        )
    return probe.changed(forward_fn=partial(_called, name=parts[0]))


def _called(module: nn.Module, inputs: Any, *, name: str) -> Any:
    part = getattr(module, name)
    if isinstance(inputs, Mapping):
        return part(**inputs)
    return part(*inputs) if isinstance(inputs, tuple) else part(inputs)


class ShardedMoment(Moment):
    """The network of a sharded run itself, which all processes evaluate together; what needs all of its weights is refused."""

    @cached_property
    def _seen(self) -> tuple[Tensor, None]:
        with isolated():
            return sharded_outputs(self.network, self.inputs, batch_norm=self._batch_norm), None

    def seen_by(self, look: Callable[..., Seen]) -> Seen:
        """Refuse what evaluates a copy.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(f"not measured: {NO_COPY}")

    def sample_loss(self, targets: Tensor, loss_fn: LossFn) -> SampleLoss:
        """Refuse the loss as a function of the weights.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(f"not measured: {NO_COPY}")

    @cached_property
    def features(self) -> LastFeatures | str:
        """Return why there are none."""
        return NO_COPY
