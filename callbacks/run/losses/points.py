"""``points_of``: the loss of the training step on a few samples at many outputs, at later steps, and with other weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_conv.callbacks.run.call import NotAFunctionError
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.callbacks.run.step.drawn_weights import draw_weights
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.losses.of_outputs import Point, evaluate, settings
from lightning_conv.losses.separation import is_same

CHANCES = 16
"""Seeds from which the step is run in the modes of the run, and wherever it draws random numbers: at the same outputs the loss must be the
same for all of them."""

WITH_CALLS = 4
"""Of the later steps, one in so many has the calls of the network in it, which may do something else in a later step, too."""


def without_needless_calls(few: StepOutputs) -> StepOutputs:
    """Return the step without the calls of the network, if it gives the same loss at random outputs so; otherwise as it is."""
    with attempted(Exception):  # what fails without the calls is evaluated with them
        quick, u = few.without_calls(), few.present
        drawn = torch.randn(u.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        with isolated():
            seed_all(0)
            with_calls = evaluate(few, u + drawn.to(u))
            seed_all(0)
            if is_same(evaluate(quick, u + drawn.to(u)), with_calls):
                return quick
    return few


def points_of(trainer: Any, later: Twin, few: StepOutputs, quick: StepOutputs, observed: Observed) -> list[Point]:
    """Return the loss at many outputs, and at the present ones for many seeds.

    The latter also in the modes of the run, an epoch and up to ``CHANCES`` batches and steps later, one after the other; on another copy,
    since in training mode the step changes buffers.

    Args:
        trainer: Trainer of the run.
        later: That copy, which was told of the next epoch.
        few: The step on a few samples.
        quick: The same without the calls of the network that it does not need.
        observed: How the step calls its network.
    """
    points: list[Point] = []
    for seed in range(CHANCES if observed.random else 1):
        with isolated():
            seed_all(seed)
            made = quick if seed % WITH_CALLS else few
            again = settings(quick, few.present) if seed < 2 or not points else [evaluate(made, points[0].outputs)]
            points += [point for point in again if point.finite]
    observed.set_up(
        later
    ).goes_on = later.module.automatic_optimization  # otherwise a count may decide which optimizer steps
    for seed in range(CHANCES if points else 0):
        made = quick if seed % WITH_CALLS else few
        points += _later(later, made, points[0], seed, _ahead(trainer, few.batch_idx, seed))
    return points


def changes_with_weights(other: Twin, few: StepOutputs, observed: Observed, present: Point) -> bool:
    """Return whether the loss at the present outputs is another one with other weights, which need not have a gradient there.

    Args:
        other: A copy of the module, which gets other weights. It may have made later steps, if these do not change the loss.
        few: The step on a few samples.
        observed: How the step calls its network.
        present: The loss at the present outputs.
    """
    other.module.eval()
    observed.set_up(other).goes_on = False
    other.tell(few.twin.global_step)
    draw_weights(other, 0, 1.0)
    with isolated():
        there = evaluate(replace(few, twin=other), present.outputs)
    return there.finite and not is_same(there, present)


def _ahead(trainer: Any, batch_idx: int, number: int) -> int:
    """Return by how many batches the step is ahead: by one more each time as long as the epoch has them, and then by 1."""
    return 1 + number if batch_idx + 1 + number < trainer.num_training_batches else 1


def _later(later: Twin, few: StepOutputs, present: Point, seed: int, ahead: int) -> list[Point]:
    """Return the loss at the present outputs so many batches and steps ahead; nothing where the step gives none there."""
    step = later.global_step
    later.tell(step + ahead)
    try:
        with isolated():
            seed_all(seed)
            there = evaluate(replace(few, twin=later, batch_idx=few.batch_idx + ahead), present.outputs)
    except NotAFunctionError:
        if ahead < 2:
            raise
        return []
    finally:
        later.tell(step)
    return [there] if there.finite else []


def unsteady(points: Sequence[Point]) -> str:
    """Return how the loss differs at the same outputs: with random numbers, from one run of the step to the next, or in training."""
    first = points[0]
    for point in points[1:]:
        if point.outputs.shape != first.outputs.shape or not torch.equal(point.outputs, first.outputs):
            continue
        if not is_same(point, first):
            return (
                "at the same outputs it is not always the same: it changes with random numbers, each time that the step is run, "
                "from one step or epoch to the next, or between training and evaluation"
            )
    return ""
