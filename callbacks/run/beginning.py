"""``measurement_of``: what a fit begins to measure; ``cannot_measure``: why it cannot, and the line that helps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.run.data.batch import to_device, transfer
from lightning_conv.callbacks.run.data.data_generators import unread
from lightning_conv.callbacks.run.data.readable import why_unreadable
from lightning_conv.callbacks.run.data.sampling import training_samples
from lightning_conv.callbacks.run.group import entry_of
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.line_to_write import line_to_write, without_measuring
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.losses.run_loss import COMPARED, unknown
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.network import RunNetwork, kept, network_of
from lightning_conv.callbacks.run.probe import BY_HAND, Probe
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.callbacks.run.step.optimizers import measured_parameters
from lightning_conv.callbacks.run.step.samples_of_batch import count_samples, describe, places_of_samples, rows_of
from lightning_conv.callbacks.run.step.seeking import NoLossError
from lightning_conv.health.kernel.subset_parameters import Subset, subset_parameters
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.reading.samples import NotFiniteSamplesError
from lightning_conv.networks.inputs import sample_count
from lightning_conv.networks.observed.leaves import Place, tensors_in


def measurement_of(
    trainer: pl.Trainer,
    probe: Probe,
    schedule: Schedule,
    *,
    batch: Any = None,
    stored: Mapping[str, Any] | None = None,
    per_layer: bool = False,
    loss_fn: LossFn | None = None,
    bound: Subset | None = None,
) -> Measurement:
    """Find out what is measured: which network, on which samples, over which parameters.

    Args:
        trainer: Trainer of the run.
        probe: The settings.
        schedule: Decides when to measure.
        batch: The first batch, where samples cannot be read one by one; None: they are read from the data set.
        stored: State of a callback in a checkpoint, with samples and names of parameters.
        per_layer: Whether each layer's own kernel is needed.
        loss_fn: The loss as the user has said it, for ``Probe(outputs="loss")``.
        bound: Of the parameters, those whose kernel is measured, for a bound of lambda_min over all of them; None: all.

    Raises:
        MisconfigurationException: There are fewer than two samples, no such parameter, or no way to read samples.
        NotObservedError, NotATwinError, ...: The training step cannot be observed; ``cannot_measure`` makes a message of it.
    """
    stored = stored or {}
    names = stored["parameters"] if stored else measured_parameters(trainer, probe)
    may_be_few = not stored and schedule.every_n_steps is None and "size" not in probe.given
    network = _network(trainer, probe, names, batch, stored.get("read"), may_be_few=may_be_few)
    if stored:
        network = network.on(stored["inputs"], stored.get("targets"))
    if sample_count(network.inputs) < 2:
        raise MisconfigurationException("Probe: the training set has a single sample; a kernel needs at least 2")
    changed = str(stored.get("loss_changed", ""))
    made = Measurement(trainer, network, names, schedule, per_layer=per_layer, loss_fn=loss_fn, loss_changed=changed)
    if stored:
        kept_probe = copy.copy(probe)
        kept_probe.outputs = stored.get("outputs", probe.outputs)
        made.change(kept_probe, made.inputs, made.targets)
        made.highest = cast("Precision", stored.get("highest", "certified"))
    made.precision = cast("Precision", stored.get("precision", "fast"))
    if bound is not None:
        made.bound_by(names if stored else _subset(trainer, made, bound))
    return made


def _subset(trainer: pl.Trainer, whole: Measurement, asked: Subset) -> tuple[str, ...]:
    """Return the names of the parameters whose kernel bounds the whole one, alike on all processes.

    Raises:
        MisconfigurationException: There are none of these names.
    """
    inputs = to_device(whole.inputs, trainer.lightning_module.device)
    one_row, mode = whole.probe.outputs == "loss", whole.probe.batch_norm
    with isolated():
        try:
            names = subset_parameters(
                whole.network(),
                inputs,
                asked,
                among=whole.parameters,
                one_row=one_row,
                batch_norm=mode,
                argument="bound",
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
    return tuple(trainer.strategy.broadcast(names)) if trainer.world_size > 1 else names


def _network(
    trainer: pl.Trainer, probe: Probe, names: Sequence[str], batch: Any, read: int | None, *, may_be_few: bool
) -> RunNetwork:
    """Return the network; ``read`` is the number of samples that were read before the checkpoint."""
    if probe.inputs is not None:
        return _given_by_hand(trainer, probe, names, batch)
    samples, count = _samples(trainer, probe, batch)
    if read is not None and read < count:
        samples, count = rows_of(samples, count, torch.arange(read)), read
    found = network_of(trainer, probe, names, samples, count, may_be_few=may_be_few)
    if batch is not None:
        return found
    # Of a slow network the first samples are measured.
    return replace(found, numbers=tuple(probe.numbers(trainer)[: sample_count(found.inputs)]))


def _samples(trainer: pl.Trainer, probe: Probe, batch: Any) -> tuple[Any, int]:
    """Return the probe's samples with their number: read from the data set, or the first ones of the first batch."""
    if batch is None:
        return probe.batch(trainer)
    first = trainer.strategy.broadcast(batch) if trainer.world_size > 1 else batch
    count = count_samples(first)
    few = min(count, probe.size)
    return rows_of(first, count, torch.arange(few)), few


def _given_by_hand(trainer: pl.Trainer, probe: Probe, names: Sequence[str], batch: Any) -> RunNetwork:
    """Return the network on samples given by hand; its loss is observed on samples of the run."""
    by_itself = copy.copy(probe)
    by_itself.inputs, by_itself.targets, by_itself.size = None, None, 2 * COMPARED
    with attempted(Exception) as attempt:
        loss = network_of(trainer, by_itself, names, *_samples(trainer, by_itself, batch)).loss
    if attempt.failed:
        loss = unknown(f"the training step could not be observed ({attempt.error})")
    if loss.own is not None:
        loss = unknown(
            "the samples were given by hand, and the step's own loss is that of a batch; Probe(size=...) measures such"
        )
    assert probe.inputs is not None
    return RunNetwork(probe, *kept(probe.inputs, probe.targets, probe.size), loss)


def two_samples_of(probe: Probe) -> Probe:
    """Return a probe of the same settings with two samples."""
    return probe.changed(size=2)


def reads_samples(trainer: pl.Trainer) -> bool:
    """Return whether the run's training samples can be read one by one, in this process.

    That only the workers of the loader can read them is said in a warning: the first batch is used in their place.
    """
    try:
        samples, loader = training_samples(trainer, hint=BY_HAND)
    except MisconfigurationException:
        return False
    why = why_unreadable(samples, loader)
    if trainer.world_size > 1:
        why = trainer.strategy.broadcast(why)
    if why:
        rank_zero_warn(
            f"The training samples are read in the workers of the loader, and not in the main process ({why}); the first batch is used "
            "in their place"
        )
    return not why


def cannot_measure(trainer: pl.Trainer, callback: pl.Callback, error: Exception, probe: Probe, batch: Any) -> str:
    """Return the message for a run that cannot be measured: the callback, what was seen, and the line to write.

    Args:
        trainer: Trainer of the run.
        callback: That wanted to measure.
        error: What it failed by.
        probe: Its settings.
        batch: The first batch, where it is known; None: a few samples are read.
    """
    name, said = type(callback).__name__, str(error) or "no message"
    entry = type(entry_of(trainer, callback)).__name__
    of = "" if probe.optimizer is None else f" ({probe.optimizer})"
    if isinstance(error, MisconfigurationException):
        return said if said.startswith(name) else f"{name}: {said}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return (
            f"{name}{of}: no room for the kernel ({said}); use fewer samples (Probe(size={max(probe.size // 2, 2)})), fewer outputs or "
            "parameters (Probe(outputs=..., parameters=...)), or allow more (Probe(max_memory=...))"
        )
    if isinstance(error, (NotFiniteSamplesError, NoLossError)):  # no other way to call the network helps
        return f"{name}{of}: {said}; {without_measuring(entry)}"
    batch, places = _seen(trainer, batch)
    seen = f" on a batch of {describe(batch)}" if any(True for _ in tensors_in(batch)) else ""
    return (
        f"{name}{of}: the network of {type(trainer.lightning_module).__name__} could not be measured{seen} "
        f"({type(error).__name__}: {said}); {line_to_write(trainer, entry, probe, batch, places)}"
    )


def _seen(trainer: pl.Trainer, batch: Any) -> tuple[Any, Sequence[Place]]:
    """Return a batch, and the places of its tensors that have a row for each sample; nothing where samples cannot be read."""
    if batch is not None:
        return batch, places_of_samples(batch)
    try:
        samples, loader = training_samples(trainer, hint=BY_HAND)
        with unread(samples, loader.collate_fn):
            count = len(samples)  # type: ignore[arg-type]
            two, three = (transfer(trainer, loader.collate_fn([samples[i % count] for i in range(n)])) for n in (2, 3))
            return two, places_of_samples(two, three)
    except Exception:  # the message does without
        return (), []
