"""``HeadSteps``: the run's own optimizer moves the head in phase 2; base of the other rules."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_conv.callbacks.guard.view import GuardView


class HeadSteps:
    """The run's own optimizer moves the head, and nothing is claimed of its steps. Other rules derive from this one.

    Args:
        view: The run.
    """

    def __init__(self, view: GuardView) -> None:
        self._view = view

    def before_step(self, optimizer: Optimizer) -> None:
        """Take part when the gradients are there and the optimizer is about to step.

        Args:
            optimizer: Optimizer of the run.
        """

    def move_head(self) -> None:
        """Make the rule's own step where the optimizer is about to make its own."""

    def after_step(self) -> str | None:
        """Return what the optimizer should not have done in its step; None if all is well."""
        return None

    def measure(self) -> dict[str, float]:
        """Return the numbers for the history that are known: ``loss``, ``gap``, ``bound``, ``step_size``."""
        return self._view.loss.measure(self._view.network)

    def give_up(self, why: str) -> None:
        """Withdraw what was proven of the steps.

        Args:
            why: The reason.
        """
