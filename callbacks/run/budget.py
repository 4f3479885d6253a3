"""``fit_to_budget``: how many samples and outputs a measurement may have so that it costs no more than it was promised to."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.pass_time import FEWEST_SAMPLES, backward_share, time_pass, together
from lightning_conv.callbacks.run.probe import ProbeOutputs
from lightning_conv.health.wording import counted
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.networks.inputs import Inputs, sample_count, spread

Everything: TypeAlias = tuple[Inputs, Tensor | None]

LEAST_SECONDS = 1.0
"""Seconds that all of the first measurement may take where the epoch is short."""

FIRST_SAMPLES = 16
"""Samples of the first trial."""

GROWTH = 2.2
"""Allowed for twice the samples: passes take twice as long, products of the kernel four times."""

SLOWER: tuple[tuple[Precision, float], ...] = (("exact", 2.5), ("certified", 10.0))
"""How much longer a kernel takes in a higher precision than in the one before it, roughly."""

CERTIFIED = 5.0
"""How much longer a pass takes where only certified numbers are wanted: it is made in float64, and watched."""

LOSS_PASSES = 2
"""Passes that the kernel of the loss gradients takes: the network's, and the one of the step."""

LATER = 0.2
"""Share of the seconds of the first measurement that a later one may take: the first one includes the trials."""

READING = 10.0
"""Forward and backward passes that it takes to read a network and to check that its samples do not couple, roughly: 9 for ResNet-18."""

BESIDE = 40.0
"""Passes that the callbacks take beside the kernel in the first measurement, roughly: losses, features, criteria, health."""

PATIENT_SECONDS = 3.0
"""Predicted seconds of the smallest first measurement from which it waits until the run is long enough for it."""

KERNELS: dict[ProbeOutputs, str] = {
    "trace": "the trace kernel",
    "full": "the full kernel",
    "sum": "the kernel of the sum",
    "projected": "an estimate of the trace kernel from random projections",
    "loss": "the kernel of the loss gradients (logged under loss_kernel/, and not the NTK)",
}


@dataclass(frozen=True)
class Choice:
    """What is measured within the budget.

    Attributes:
        samples: Number of samples.
        outputs: Which kernel.
        seconds: What its kernel took, spectrum included.
        whole: Number of samples that were asked for.
        n_outputs: Number C of outputs of a sample.
        budget: Seconds that all trials together may take.
        waits: Seconds that the first measurement is predicted to take, for which the run must become long enough; 0: it was made.
    """

    samples: int
    outputs: ProbeOutputs
    seconds: float
    whole: int
    n_outputs: int
    budget: float
    waits: float = 0.0

    @property
    def is_reduced(self) -> bool:
        """Whether less is measured than was asked for."""
        return self.samples < self.whole or self.outputs != "trace"

    @property
    def words(self) -> str:
        """What was chosen, what it costs, and how to ask for more."""
        kernel = KERNELS[self.outputs]
        of = f"{self.samples} of {self.whole} samples" if self.samples < self.whole else f"{self.samples} samples"
        within = (
            f"so that the first measurement stays within {self.budget:.2g} s"
            if self.seconds <= self.budget
            else f"the least there is, though the first measurement was to stay within {self.budget:.2g} s"
        )
        return (
            f"measured is {kernel} of {counted(self.n_outputs, 'output')} on {of}, in about {self.seconds:.2g} s each time, {within}; "
            f'Probe(size={self.whole}, outputs="trace") asks for all of it, '
            "whatever it costs"
        )


def seconds_of_an_epoch(trainer: pl.Trainer, seconds: float, samples: int) -> float:
    """Predict how long an epoch takes.

    Args:
        trainer: Trainer of the run.
        seconds: Duration of a forward and a backward pass.
        samples: Number of samples in them.

    Returns:
        Seconds; 0 where the number of batches is not known.
    """
    batches = trainer.num_training_batches
    if 0 < getattr(trainer, "max_steps", -1) < batches:
        batches = trainer.max_steps
    size = batch_size_of(trainer)
    if size is None or batches == float("inf"):
        return 0.0
    return float(batches) * size * seconds / samples


def batch_size_of(trainer: pl.Trainer) -> int | None:
    """Return the number of samples in a batch of one process, as the training loader tells it; None: it does not.

    Args:
        trainer: Trainer of the run.
    """
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def fit_to_budget(
    trainer: pl.Trainer, measurement: Measurement, share: float, spent: float = 0.0, parts: int = 1
) -> Choice:
    r"""Choose samples and outputs by trials that grow: the kernel of a few samples, then of twice as many, while the time allows.

    All trials together take at most :math:`B = \max(1\,\mathrm{s}, \text{share} \times \text{epoch})`, finding the network included,
    and a later measurement a fifth of it. The trace kernel of C outputs takes C backward passes. Where they would take too long, it is
    estimated from random projections; and where that takes too long for ``FEWEST_SAMPLES``, the kernel of the loss gradients is the last
    choice: one backward pass, if the loss is known, and no callback reads numbers of the NTK. A kernel that is to prove a bound is never
    estimated: what follows the trace kernel is that of the loss gradients.
    Higher precisions are tried, and allowed later, as far as the time reaches.
    The number of samples and the outputs that the Probe names stay as they are. A network that takes more than ``PATIENT_SECONDS`` to
    read is not measured yet: ``Measurement.awaited`` then has the prediction.

    Args:
        trainer: Trainer of the run.
        measurement: What is measured; it is changed.
        share: Of the predicted seconds of an epoch, such as 0.03.
        spent: Seconds that finding the network has taken.
        parts: Number of measurements that share B; each has an equal part of it.

    Cost: B at most, unless a single trial of ``FEWEST_SAMPLES`` samples takes longer.
    """
    probe, begun = measurement.probe, time.perf_counter() - spent
    whole = sample_count(measurement.inputs)
    asked = measurement.run_network.asked or whole
    given = probe.given
    samples = whole if "size" in given else min(FIRST_SAMPLES, whole)
    seconds, outputs = time_pass(trainer, measurement, samples)
    timed = samples
    budget = max(LEAST_SECONDS, share * seconds_of_an_epoch(trainer, seconds, samples)) / parts
    kind: ProbeOutputs = probe.outputs
    slowness = CERTIFIED if measurement.is_bound else 1.0
    seconds *= slowness
    # Those passes of the trace kernel go back no further than to the first of its parameters.
    traced = outputs * (backward_share(trainer, measurement) if measurement.is_bound else 1.0)
    is_dear = kind == "projected" or (
        "outputs" not in given and outputs > probe.projections and traced * seconds > budget * LATER / 2
    )
    if is_dear and not measurement.is_bound:
        kind = "projected"
    passes = probe.projections if kind == "projected" else traced if kind == "trace" else 1
    left = budget - together(trainer, time.perf_counter() - begun)
    while (
        "size" not in given
        and samples > FEWEST_SAMPLES
        and (passes * seconds > budget * LATER or (READING + BESIDE + passes) * seconds > left)
    ):
        samples, seconds, timed = max(FEWEST_SAMPLES, samples // 2), seconds / 2, max(FEWEST_SAMPLES, samples // 2)
    if is_dear and passes * seconds > budget and _may_be_of_loss(trainer, measurement):
        kind, passes, given_size = "loss", LOSS_PASSES, "size" in given
        wanted = whole if given_size else min(FIRST_SAMPLES, whole)
        samples, seconds, timed = wanted, seconds * wanted / timed, wanted
        while not given_size and samples > FEWEST_SAMPLES and LOSS_PASSES * seconds > budget * LATER:
            samples, seconds, timed = max(FEWEST_SAMPLES, samples // 2), seconds / 2, max(FEWEST_SAMPLES, samples // 2)
    everything = measurement.inputs, measurement.targets
    measurement.highest = measurement.lowest
    patience = max(PATIENT_SECONDS, budget - together(trainer, time.perf_counter() - begun))
    if (READING + passes) * seconds > patience:  # what is timed first is slower, as it loads and plans
        seconds = min(seconds, time_pass(trainer, measurement, samples)[0] * slowness)
    predicted = (READING + passes) * seconds
    if predicted > patience:
        _choose(measurement, everything, samples, kind)
        measurement.pass_seconds, measurement.awaited = seconds / slowness * samples / timed, predicted
        return Choice(samples, kind, predicted, asked, outputs, budget, waits=predicted)
    while True:
        taken = together(trainer, _trial(trainer, measurement, everything, samples, kind))
        spent = together(trainer, time.perf_counter() - begun)
        more = min(2 * samples, whole)
        if samples == whole or GROWTH * taken > LATER * budget or spent + GROWTH * taken > budget:
            break
        samples = more
    for precision, slower in SLOWER[PRECISIONS.index(measurement.lowest) :]:
        if measurement.is_resolved or slower * taken > LATER * budget or spent + slower * taken > budget:
            break
        measurement.highest = precision
        taken = together(trainer, _trial(trainer, measurement, everything, samples, kind))
        spent = together(trainer, time.perf_counter() - begun)
    measurement.pass_seconds = seconds / slowness * samples / timed
    return Choice(samples, kind, taken, asked, outputs, budget)


def _may_be_of_loss(trainer: pl.Trainer, measurement: Measurement) -> bool:
    """Return whether the kernel of the loss gradients may be chosen: the loss is known, and nothing waits for numbers of the NTK."""
    waiting = [
        *(each.monitor for each in callbacks_of(trainer, EarlyStopping)),
        *(each.monitor for each in callbacks_of(trainer, ModelCheckpoint)),
    ]
    return measurement.knows_loss and not any(str(each).startswith(("kernel/", "convergence/")) for each in waiting)


def _trial(
    trainer: pl.Trainer, measurement: Measurement, everything: Everything, samples: int, kind: ProbeOutputs
) -> float:
    """Measure so many samples and return how long it took."""
    _choose(measurement, everything, samples, kind)
    before = time.perf_counter()
    measurement.at(trainer.global_step)
    return time.perf_counter() - before


def _choose(measurement: Measurement, everything: Everything, samples: int, kind: ProbeOutputs) -> None:
    """Measure so many samples from now on."""
    inputs, targets = everything
    probe = copy.copy(measurement.probe)
    probe.size, probe.outputs = samples, kind
    measurement.change(probe, spread(inputs, samples), None if targets is None else _spread(targets, samples))


def _spread(targets: Tensor, samples: int) -> Tensor:
    found = spread(targets, samples)
    assert isinstance(found, Tensor)
    return found
