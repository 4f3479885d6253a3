"""``WatchedStep``: the weights right before a step of the run's optimizer and after it, for an optimizer whose step no copy may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.health.step_of_run import optimizer_of
from lightning_conv.callbacks.run.steps import changed_steps
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.step.optimizer_rules import only_rate
from lightning_conv.losses.gradient import wide

AFTER_THE_NEXT = "the optimizer's own step after this measurement is looked at"


@dataclass(frozen=True)
class StepSeen:
    """A step that the run has made.

    Attributes:
        step: Number of optimizer steps before it.
        rate: The learning rate of all weights; None: they have several, or there is none.
        before: The weights before it, by name.
    """

    step: int
    rate: float | None
    before: Mapping[str, Tensor]

    def update(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the step has added to the weights, in float64 (float32 on devices without it).

        Args:
            weights: Those of now.
        """
        return {name: wide(each.detach()) - wide(self.before[name]) for name, each in weights.items()}


class WatchedStep:
    """Waits for one step after a measurement.

    Nothing is done in the other steps. The optimizer is read, and nothing of it is called.

    Attributes:
        waits: Whether a step is waited for.
    """

    def __init__(self) -> None:
        self.waits = False
        self._seen: StepSeen | None = None

    def begin(self) -> None:
        """Begin a fit: a step that was under way is not known any more, one that was waited for is."""
        self._seen = None

    def ask(self, run: RunView) -> str:
        """Wait for the next step, and return why it cannot be told what it does; empty if it can.

        The step may be anything: gradients may be accumulated, clipped, scaled or changed by hooks, since the weights are looked at.

        Args:
            run: The run at this moment.
        """
        why = changed_steps(run.trainer, watched=True)
        if any(each.is_complex() for each in trained_weights(run).values()):
            why = why or "some weights are complex"
        self.waits, self._seen = not why, None
        return why

    def before(self, run: RunView) -> None:
        """Keep the weights, when the optimizer is about to step.

        Args:
            run: The run at this moment.

        Cost: a copy of the weights that the optimizer trains, at the first call after ``ask``; nothing otherwise.
        """
        if self.waits and self._seen is None:  # a closure may be called several times in one step
            weights = {name: each.detach().clone() for name, each in trained_weights(run).items()}
            self._seen = StepSeen(run.step, only_rate(optimizer_of(run)), weights)

    def after(self, run: RunView) -> StepSeen | None:
        """Return the step if it has been made, which is then no longer waited for; None: it has not, or more than one has.

        Args:
            run: The run at this moment.
        """
        seen = self._seen
        if seen is None or run.step == seen.step:
            return None
        self.waits, self._seen = False, None
        return seen if run.step == seen.step + 1 else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types. A copy of weights is not part of it: checkpoints are written between steps."""
        return {"waits": self.waits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.waits, self._seen = state["waits"], None


def trained_weights(run: RunView) -> dict[str, nn.Parameter]:
    """Return the weights of the measured network that the optimizer has and that require gradients, by name.

    Args:
        run: The run at this moment.
    """
    held = {id(each) for group in optimizer_of(run).param_groups for each in group["params"]}
    named = run.parameters_of_network
    return {name: each for name, each in named.items() if id(each) in held and each.requires_grad}
