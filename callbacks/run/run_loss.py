"""``find_run_loss``: the loss that the training step minimises, as a function of the outputs: observed, given or unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_conv.callbacks.run.call import NotAFunctionError, StepCall
from lightning_conv.callbacks.run.guarded import READING
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.observed import Observed
from lightning_conv.callbacks.run.samples_of_batch import first_samples
from lightning_conv.callbacks.run.training_set import seed_all
from lightning_conv.callbacks.run.twin import NotATwinError, Twin
from lightning_conv.losses.kind import LossFn, LossKind, loss_kind
from lightning_conv.losses.of_outputs import Point, difference, evaluate, settings
from lightning_conv.losses.torch_loss import USUAL_LOSSES
from lightning_conv.networks.observed.leaves import at, tensors_in

Source: TypeAlias = Literal["observed", "given", "unknown"]

CHANCES = 16
"""Seeds from which the step is run in the modes of the run, and wherever it draws random numbers: at the same outputs the loss must be the
same for all of them."""

COMPARED = 8
"""Samples on which losses are compared: the step is run some twenty times on them."""


@dataclass(frozen=True)
class RunLoss:
    """The loss of the training step as far as it is known.

    Attributes:
        fn: The loss as a function of (outputs, targets); None: not known.
        targets: Its targets on the probe; None: not known.
        source: ``"observed"``: the step's value and gradient are those of ``fn``, at many outputs. ``"given"``: the user has said it.
            ``"unknown"``: neither.
        reason: Why it is unknown; empty if it is not.
    """

    fn: Any
    targets: Tensor | None
    source: Source
    reason: str = ""

    @property
    def kind(self) -> LossKind:
        """The facts about it."""
        return loss_kind(self.fn)

    @property
    def words(self) -> str:
        """How the loss was found, for a user."""
        if self.source == "unknown":
            return f"the loss is unknown: {self.reason}"
        return f"the loss is {self.kind.described} ({self.source})"


def find_run_loss(
    twin: Twin, observed: Observed, batch: Any, own: Sequence[LossFn], take: Callable[[Any], Tensor | None]
) -> RunLoss:
    """Find the loss that the training step computes from the network's outputs u, by comparing it with losses of torch.

    The step is run on a few samples with other outputs in place of the network's, and its value and its gradient by the outputs are
    compared with those of a loss of (outputs, targets) (``losses.of_outputs``). The targets may be any tensor of the batch.

    Args:
        twin: A copy of the module, in eval mode; it is left in the modes of the run.
        observed: How the step calls its network.
        batch: Samples as the step gets them.
        own: Losses that the module has, which are tried first.
        take: Takes the targets that are tried first out of a batch; None: there are none.

    A loss that is another one in training than in evaluation, or depends on random numbers beside the outputs, is found by running the step
    in the modes of the run from ``CHANCES`` seeds.

    Cost: some thirty forward passes of the step on ``COMPARED`` samples, and twice as many where it draws random numbers in eval mode.
    """
    if observed.beside:
        return unknown(f"it depends on {observed.beside[0]!r} beside the outputs, as a penalty on the weights does")
    if observed.draws:
        return unknown("the network draws random numbers")
    output = observed.source
    if any(each.padded for each in observed.outputs):
        return unknown("the outputs of each sample come from a call of its own")
    if output is None:
        return unknown(
            f"it depends on {len(observed.outputs)} results of modules together, not on one tensor of outputs"
        )
    if output.axis or output.several:
        return unknown("the outputs do not have their samples in the rows, one each")
    few = first_samples(batch, observed.samples, COMPARED, tuple(observed.given.lists.values()))
    call = StepCall(twin, output.name, few, place=output.place)
    points: list[Point] = []
    try:
        for seed in range(CHANCES if observed.random else 1):
            with isolated():
                seed_all(seed)
                again = (
                    settings(call, call.observe().outputs)
                    if seed < 2 or not points
                    else [evaluate(call, points[0].outputs)]
                )
                points += [point for point in again if point.finite]
        present = points[:1]
        twin.take_modes_of_the_run()
        for seed in range(CHANCES):
            with isolated():
                seed_all(seed)
                points += [there for point in present if (there := evaluate(call, point.outputs)).finite]
    except (*READING, NotAFunctionError, NotATwinError) as error:
        return unknown(f"it could not be evaluated as a function of the outputs ({error})")
    if not points:
        return unknown("it is not finite")
    usual = [(take(few), take(batch))] + [(tensor, at(batch, place)) for place, tensor in tensors_in(few)]
    apart = ""
    for fn in (*own, *USUAL_LOSSES):
        for number, (small, whole) in enumerate(usual):
            differs = None if small is None else _difference(points, loss_kind(fn), small)
            if differs == "":
                return RunLoss(fn, whole, "observed")
            if differs and fn in own and not number:
                apart = f"; of {loss_kind(fn).name} it differs: {differs}"
    return unknown(f"the step minimises none of torch's usual losses of a tensor of the batch{apart}")


def unknown(reason: str) -> RunLoss:
    """Return a loss that is not known.

    Args:
        reason: Why.
    """
    return RunLoss(None, None, "unknown", reason)


def given(fn: LossFn, found: RunLoss) -> RunLoss:
    """Return the loss that the user says.

    Args:
        fn: The loss as a function of (outputs, targets).
        found: What was found out about it, whose targets stay.
    """
    return RunLoss(fn, found.targets, "given")


def _difference(points: Sequence[Point], loss: LossKind, targets: Tensor) -> str | None:
    """Return how the step differs from a loss; empty: not at all; None: it is no loss of these targets."""
    outputs = points[0].outputs
    if not targets.ndim or len(targets) != len(outputs) or (loss.elementwise and targets.numel() != outputs.numel()):
        return None
    try:
        return difference(points[:1], lambda u: loss.evaluate(u, targets)) or difference(
            points, lambda u: loss.evaluate(u, targets)
        )
    except READING:
        return None
