"""``seek``: one run of the training step on a copy of the module, in the first batch in which the watched optimizer steps."""

from __future__ import annotations

import random as random_of_python
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.step.still import StepLoss
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.observed.calls import Call, CallWatch
from lightning_conv.networks.observed.carried import Attribute, Tensors, tensors_held, written
from lightning_conv.networks.observed.draws import Draws
from lightning_conv.networks.observed.frontier import Key, Output
from lightning_conv.networks.observed.leaves import with_tensors
from lightning_conv.networks.undisturbed import undisturbed

BATCHES = 8
"""Batches in which a step of an optimizer is looked for."""


class NotObservedError(ValueError):
    """The training step is not a function of samples that can be measured; the message says why."""


class NoLossError(NotObservedError):
    """The training step gives no loss."""


@dataclass(frozen=True)
class Seen:
    """One run of the step."""

    loss: Tensor
    calls: list[Call]  # the outermost ones
    draws: list[Tensor]
    random: bool  # whether random numbers were drawn, those of Python and NumPy included
    numbers: tuple[int, ...]  # of the losses
    steps: int  # that the watched optimizer made
    batch_idx: int
    aside: str  # which of its losses and steps are meant, in words
    before: list[dict[str, Any]]  # attributes of the modules before it
    written: dict[Attribute, Tensors]  # tensors that it put into attributes of its modules

    @property
    def results(self) -> dict[Key, Output]:
        """All that modules have returned."""
        calls = [each for call in self.calls for each in call.all]
        found = [Output(call, result) for call in calls for result in call.results]
        return {each.key: each for each in found}


def seek(twin: Twin, batch: Any) -> Seen:
    """Run the step as that of the first batch from now in which the watched optimizer steps, and leave the copy told of it.

    Args:
        twin: A copy of the module, in eval mode.
        batch: A batch as the training step gets it.

    Raises:
        NoLossError: The step gives no loss.
        NotObservedError: No loss is seen that the optimizer minimises.
    """
    step = twin.global_step
    first = seen = run_step(twin, batch, 0)
    ahead = 0
    while twin.seeks and not (seen and seen.steps) and (ahead := ahead + 1) < BATCHES:
        twin.tell(step + ahead)
        with attempted(Exception) as attempt:  # what a batch of this number is to the step, is its own
            seen = run_step(twin, batch, ahead)
        if attempt.failed:
            break
    if seen is not None and (seen.steps or not twin.seeks):
        return seen
    twin.tell(step)
    if first is None:
        if twin.watched is None or not twin.n_losses:
            raise NoLossError("the training step gives no loss: it returns none and calls no `manual_backward`")
        raise NotObservedError(
            f"the optimizer makes no step in {BATCHES} batches, and no loss of the training step reaches its parameters"
        )
    return first


def steps_in_the_next(twin: Twin, batch: Any, seen: Seen, step: int) -> bool:
    """Return whether the optimizer steps in the first batch and in the next one, so that any batch shows its network.

    Args:
        twin: A copy of the module, in eval mode.
        batch: A batch as the training step gets it.
        seen: What ``seek`` has returned.
        step: Optimizer steps that the run has done.
    """
    if not twin.seeks or not seen.steps:
        return True
    if seen.batch_idx:
        return False
    twin.tell(step + 1)
    with attempted(Exception) as attempt:
        following = run_step(twin, batch, 1)
    twin.tell(step)
    return not attempt.failed and following is not None and following.steps > 0


def run_step(twin: Twin, batch: Any, batch_idx: int) -> Seen | None:
    """Run the step once; None: no loss is seen that the watched optimizer minimises.

    Args:
        twin: A copy of the module, in eval mode.
        batch: A batch as the training step gets it.
        batch_idx: Its number in the epoch.

    Raises:
        NotObservedError: The loss is no number with a gradient.
    """
    attributes, draws = twin.attributes(), Draws()
    watch = CallWatch(draws.drawn)
    with undisturbed(twin.module), twin.refused_to_the_original(), watch.watching(twin.module), draws.recording():
        before, held = _states_outside_torch(), tensors_held(twin.module)
        twin.bare_step(with_tensors(batch, lambda _, tensor: tensor.detach().clone()), batch_idx)
        moved = before != _states_outside_torch()
        put = written(held, tensors_held(twin.module))
    found = twin.step_loss
    if found is None:
        return None
    for each in found.losses:
        if each.numel() != 1 or each.grad_fn is None:
            raise NotObservedError(
                f"the loss of the training step (shape {tuple(each.shape)}) is no number with a gradient"
            )
    random = bool(draws.drawn) or moved
    aside = _aside(twin, found, batch_idx)
    return Seen(
        found.total, watch.outermost, draws.drawn, random, found.numbers, found.steps, batch_idx, aside, attributes, put
    )


def _aside(twin: Twin, found: StepLoss, batch_idx: int) -> str:
    """Return which of the losses and steps of a training step are meant, in words; empty: it has one."""
    if twin.watched is None:
        return f"for the first of its {twin.n_losses} losses" if twin.n_losses > 1 else ""
    said = [
        f"for the sum of {len(found.losses)} losses" if len(found.losses) > 1 else "",
        f"for the first of the {found.steps} steps that this optimizer makes on a batch" if found.steps > 1 else "",
        f"in batch {batch_idx}, the first one in which this optimizer steps" if batch_idx else "",
        "though no step of this optimizer was seen" if twin.seeks and not found.steps else "",
    ]
    return ", ".join(each for each in said if each)


def _states_outside_torch() -> tuple[object, ...]:
    """Return the states of the global generators of Python and NumPy."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random_of_python.getstate(), state["key"].tobytes(), state["pos"]
