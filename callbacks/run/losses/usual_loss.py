"""``find_usual_loss``: which of torch's losses of a tensor of the batch the training step minimises, times a constant or by positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.run.guarded import READING
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.losses.arranged import ArrangedLoss, layouts, written_factor
from lightning_conv.losses.kind import LossFn, LossKind, loss_kind
from lightning_conv.losses.of_outputs import Point, difference, evaluate
from lightning_conv.losses.torch_loss import USUAL_LOSSES, is_elementwise
from lightning_conv.networks.observed.leaves import at, tensors_in


def find_usual_loss(
    few: StepOutputs,
    points: Sequence[Point],
    observed: Observed,
    batch: Any,
    own: Sequence[LossFn],
    take: Callable[[Any], Tensor | None],
) -> tuple[Any, Tensor] | str:
    """Find the loss of torch that has the step's values and gradients, and its targets.

    Args:
        few: The step on the first samples of the probe.
        points: Its loss at some outputs, the present ones first.
        observed: How the step calls its network.
        batch: All samples of the probe.
        own: Losses that the module has, which are tried first.
        take: Takes the targets that are tried first out of a batch; None: there are none.

    Returns:
        The loss and its targets on the probe; a string says how the module's own loss differs, if it has one.

    Cost: some evaluations of losses on a few outputs; where one is found, three of the step on a few samples and one on all of them.
    """
    candidates = [(take(few.batch), take(batch))] + [
        (tensor, at(batch, place)) for place, tensor in tensors_in(few.batch)
    ]
    targets = [(small, whole) for small, whole in candidates if small is not None and whole is not None]
    apart = ""
    for fn, number, small, whole in _tried((*own, *USUAL_LOSSES), few, targets, points[0]):
        differs = _difference(points, loss_kind(fn), small)
        if differs == "":
            if _in_other_batches(few, fn, observed, batch, whole):
                return fn, whole
            continue
        if differs and fn in own and not number:
            apart = f"; of {loss_kind(fn).name} it differs: {differs}"
    return apart


def _tried(
    losses: Sequence[Any], few: StepOutputs, targets: Sequence[tuple[Tensor, Tensor]], present: Point
) -> Iterator[tuple[Any, int, Tensor, Tensor]]:
    """Yield losses with targets: torch's as they are, then times a constant and over positions, where the present value tells which."""
    for fn in losses:
        for number, (small, whole) in enumerate(targets):
            yield fn, number, small, whole
    classes = few.classes
    for number, (small, whole) in enumerate(targets):
        ignored = _ignored(present, small, classes)
        for form in layouts(losses, present.outputs, classes, ignored):
            if (scaled := _scaled(form, present, small)) is not None:
                yield scaled, number, small, whole


def _ignored(present: Point, targets: Tensor, classes: int) -> list[int]:
    """Return the label all of whose positions have no slope, and no others; as a list, empty if there is none."""
    if not classes or targets.is_floating_point() or targets.dtype == torch.bool:
        return []
    slopes = present.slope.reshape(len(present.slope), -1, classes).abs().amax(2)
    labels = targets.reshape(len(targets), -1)
    for s, y in ((slopes, labels), (slopes[:, :-1], labels[:, 1:]), (slopes, labels[:, 1:])):
        if s.shape == y.shape and bool((s == 0).any()):
            found = torch.unique(y[(s == 0)])
            if len(found) == 1:
                return [int(found)]
    return []


def _scaled(form: ArrangedLoss, present: Point, targets: Tensor) -> ArrangedLoss | None:
    """Return the loss times the constant by which the step's is a multiple of it here; None: by none that someone writes, or by 1."""
    if not _fits(loss_kind(form), present.outputs, targets):
        return None
    try:
        u, y = form.arrange(present.outputs, targets)
        if is_elementwise(form.base) and u.shape != y.shape:  # torch would broadcast them
            return None
        exact = evaluate(lambda u: loss_kind(form).evaluate(u, targets), present.outputs.double())
    except READING:
        return None
    if not exact.finite or not exact.value:
        return None
    factor = written_factor(present.value / exact.value)
    if factor is None or (factor == 1 and form.is_usual):
        return None
    return replace(form, factor=factor)


def _in_other_batches(few: StepOutputs, fn: Any, observed: Observed, batch: Any, targets: Tensor) -> bool:
    """Return whether the step has the same loss in other batches, in another order.

    In one of fewer samples a mean is no sum. In that of all samples classes, weights and targets appear that the few need not have.
    """
    if observed.samples < 2:
        return False
    backwards = torch.arange(observed.samples - 1, -1, -1)
    fewer = backwards[: max(2, few.samples // 2 + 1)]
    return _is_loss_of(few, fn, observed.some(batch, fewer), targets, fewer, present=True) and _is_loss_of(
        few, fn, observed.some(batch, backwards), targets, backwards, present=False
    )


def _is_loss_of(few: StepOutputs, fn: Any, batch: Any, targets: Tensor, rows: Tensor, *, present: bool) -> bool:
    """Return whether the step has a loss on some samples at random outputs, and at the present ones if asked."""
    part = replace(few, batch=batch, samples=len(rows))
    taken = targets.index_select(0, rows.to(targets.device))
    u = part.present if present else few.present.new_zeros(len(rows), *few.present.shape[1:])
    drawn = torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(u)
    points = [evaluate(part, each) for each in ([u] if present else []) + [u + drawn]]
    return _difference(points, loss_kind(fn), taken) == ""


def _fits(loss: LossKind, outputs: Tensor, targets: Tensor) -> bool:
    return (
        bool(targets.ndim)
        and len(targets) == len(outputs)
        and not (loss.elementwise and targets.numel() != outputs.numel())
    )


def _difference(points: Sequence[Point], loss: LossKind, targets: Tensor) -> str | None:
    """Return how the step differs from a loss; empty: not at all; None: it is no loss of these targets."""
    if not _fits(loss, points[0].outputs, targets):
        return None
    try:
        return difference(points[:1], lambda u: loss.evaluate(u, targets)) or difference(
            points, lambda u: loss.evaluate(u, targets)
        )
    except READING:
        return None
