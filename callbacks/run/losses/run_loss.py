"""``find_run_loss``: the loss that the training step minimises, as a function of the outputs: observed, given or unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.callbacks.run.call import NotAFunctionError
from lightning_conv.callbacks.run.guarded import READING
from lightning_conv.callbacks.run.losses.judge_own_loss import Asked, judge_own_loss
from lightning_conv.callbacks.run.losses.own_loss import OwnLoss
from lightning_conv.callbacks.run.losses.points import changes_with_weights, points_of, unsteady, without_needless_calls
from lightning_conv.callbacks.run.losses.usual_loss import find_usual_loss
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.callbacks.run.twin import NotATwinError, Twin
from lightning_conv.losses.kind import LossFn, LossKind, loss_kind
from lightning_conv.losses.of_outputs import Point, evaluate
from lightning_conv.losses.separation import is_same

Source: TypeAlias = Literal["observed", "given", "unknown"]

COMPARED = 8
"""Samples on which losses are compared: the step is run some thirty times on them."""

SETTLED = 3
"""Points that are kept, to be compared again at later measurements."""


@dataclass(frozen=True)
class RunLoss:
    """The loss of the training step as far as it is known.

    Attributes:
        fn: The loss as a function of (outputs, targets); None: not known. An ``OwnLoss`` is that of the step's own graph: it takes the
            numbers of the samples in place of targets, and nothing is known of it beside its value, gradient and curvature.
        targets: Its targets on the probe; None: not known, or they are numbers of samples.
        source: ``"observed"``: the step's value and gradient are those of ``fn``, at many outputs. ``"given"``: the user has said it.
            ``"unknown"``: neither.
        reason: Why it is unknown; empty if it is not.
        kept: What was observed, to be compared with later.
    """

    fn: Any
    targets: Tensor | None
    source: Source
    reason: str = ""
    kept: Kept | None = None

    @property
    def kind(self) -> LossKind:
        """The facts about it."""
        return loss_kind(self.fn)

    @property
    def own(self) -> OwnLoss | None:
        """The loss from the step's own graph, if it is not one of torch's."""
        return self.fn if isinstance(self.fn, OwnLoss) else None

    @property
    def words(self) -> str:
        """How the loss was found, for a user."""
        if self.source == "unknown":
            return f"the loss is unknown: {self.reason}"
        if self.own is None:
            return f"the loss is {self.kind.described} ({self.source})"
        apart = f"no sample's part depends on another one, {self.own.separated.words}"
        return f"the loss is the step's own, {self.own.scale_words} ({self.source}; {apart})"


@dataclass(frozen=True)
class Kept:
    """The loss of a few samples at some outputs, as it was observed."""

    batch: Any
    samples: int
    places: tuple[Any, ...]
    observed: Observed
    points: tuple[Point, ...]

    def changed(self, twin: Twin) -> str:
        """Return how the step's loss at the same outputs differs from what it was; empty: it does not.

        Args:
            twin: A copy of the module as it is now, in eval mode.

        Cost: a forward pass of the step on ``COMPARED`` samples for each of ``SETTLED`` points.
        """
        call = StepOutputs(self.observed.set_up(twin), self.batch, self.places, self.samples, self.observed.batch_idx)
        try:
            for point in self.points:
                if not is_same(now := evaluate(call, point.outputs), point):
                    return f"at the same outputs it was {point.value:.6g}, and is {now.value:.6g} now"
        except (*READING, NotAFunctionError, NotATwinError) as error:
            return f"it can no longer be evaluated as a function of the outputs ({error})"
        return ""


def find_run_loss(
    trainer: Any,
    twin: Twin,
    observed: Observed,
    batch: Any,
    own: Sequence[LossFn],
    take: Callable[[Any], Tensor | None],
    parameters: Sequence[str],
) -> RunLoss:
    """Find the loss that the training step computes from the network's outputs u: one of torch's, or the step's own.

    The step is run on a few samples with other outputs in place of the network's, and its value and its gradient by the outputs are
    compared with those of a loss of (outputs, targets) (``losses.of_outputs``), times a constant, and over the positions of a sequence
    (``ArrangedLoss``). The targets may be any tensor of the batch. If none is equal, the loss is taken from the step's own graph, as far
    as ``judge_own_loss`` shows that it is a function of the outputs, sample by sample.

    Args:
        trainer: Trainer of the run.
        twin: A copy of the module, in eval mode; in which it stays.
        observed: How the step calls its network.
        batch: Samples as the step gets them.
        own: Losses that the module has, which are tried first.
        take: Takes the targets that are tried first out of a batch; None: there are none.
        parameters: Names, in the copy, of the parameters that the kernel is over.

    A loss that is another one in training than in evaluation, or depends on random numbers beside the outputs, is found by running the step
    in the modes of the run from ``CHANCES`` seeds, as at each of the next steps and in the next epoch. One that takes something from the
    weights that has no gradient is found with other weights.

    Cost: some thirty forward passes of the step on ``COMPARED`` samples, and twice as many where it draws random numbers in eval mode; for
    a loss that is none of torch's, what ``judge_own_loss`` says.
    """
    if observed.beside:
        return unknown(
            f"it depends on {observed.beside[0]!r} beside the outputs: a penalty on the weights, or a network that goes on after them"
        )
    if observed.draws:
        return unknown("the network draws random numbers")
    if any(each.padded for each in observed.outputs):
        return unknown("the outputs of each sample come from a call of its own")
    rows = torch.arange(min(COMPARED, observed.samples))
    few = StepOutputs(twin, observed.some(batch, rows), observed.sources, len(rows), observed.batch_idx)
    try:
        quick = without_needless_calls(few)
        later = Twin(trainer, trainer.lightning_module, step=twin.global_step, epoch=trainer.current_epoch + 1)
        points = points_of(trainer, later, few, quick, observed)
        if not points:
            return unknown("it is not finite")
        if differs := unsteady(points):
            return unknown(differs)
        if changes_with_weights(later, few, observed, points[0]):
            return unknown(
                "at the same outputs it changes with the weights, through what has no gradient, such as detached outputs"
            )
        found = find_usual_loss(quick, points, observed, batch, own, take)
        asked = Asked(trainer, twin, observed, parameters, batch, quick, points)
        loss = _own(asked, found) if isinstance(found, str) else RunLoss(*found, "observed")
    except (*READING, NotAFunctionError, NotATwinError) as error:
        return unknown(f"it could not be evaluated as a function of the outputs ({error})")
    if loss.source == "unknown":
        return loss
    places = sorted({0, len(points) // 2, len(points) - 1})[:SETTLED]
    return replace(loss, kept=Kept(few.batch, few.samples, few.places, observed, tuple(points[k] for k in places)))


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


def _own(asked: Asked, apart: str) -> RunLoss:
    loss = judge_own_loss(asked)
    if isinstance(loss, str):
        none = f"the step minimises none of torch's usual losses of a tensor of the batch{apart}"
        return unknown(
            f"{none}, and its own is no function of the outputs, sample by sample, that can be relied on: {loss}"
        )
    return RunLoss(loss, None, "observed")
