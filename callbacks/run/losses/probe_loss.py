"""``ProbeLoss``: the loss of the training step on the probe as a run goes on: still what was observed, and its gradients by the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.losses.run_gradient import RunGradient, is_compared
from lightning_conv.callbacks.run.losses.run_loss import RunLoss, given, unknown
from lightning_conv.callbacks.run.measuring import rarely_collected
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.losses.of_outputs import evaluate


class ProbeLoss:
    """Follows the loss of the training step.

    Args:
        trainer: Trainer of the run.
        observed: The loss as it was found at the beginning.
        loss_fn: The loss as the user has said it; None: nothing was said.
        changed: How it was seen to change before the checkpoint; empty: it was not.

    Attributes:
        changed: Why what was observed no longer counts; empty: it does.
    """

    def __init__(
        self, trainer: pl.Trainer, observed: RunLoss, loss_fn: LossFn | None = None, changed: str = ""
    ) -> None:
        self._trainer, self._observed, self._loss_fn, self.changed = trainer, observed, loss_fn, changed
        self._begun = trainer.global_step
        self._gradient: RunGradient | None = None  # that waits for the run's backward pass
        self._compared = False  # whether the gradient of one step was computed

    def now(self, fn: LossFn | None = None) -> RunLoss:
        """Return the loss as it is known now.

        Args:
            fn: The loss as the user has said it; None: what was observed, or that it has changed since.
        """
        found = unknown(self.changed) if self.changed else self._observed
        return found if fn is None else given(fn, found)

    def is_known(self, targets: Tensor | None) -> bool:
        """Return whether its gradient by the outputs can be taken on the probe.

        Args:
            targets: Targets of the probe.
        """
        loss = self.now(self._loss_fn)
        return loss.fn is not None and (loss.own is not None or targets is not None)

    @property
    def reason(self) -> str:
        """Why the loss is not known; empty if it is."""
        return self.now(self._loss_fn).reason

    def gradients(self, outputs: Callable[[], Tensor], targets: Tensor | None, rows: Tensor) -> Tensor:
        """Return s, the gradient of the loss of the probe by its outputs, (m, C), in the loss's own scale: that of a mean carries 1 / m.

        Args:
            outputs: Gives u on the probe, (m, ...).
            targets: Targets of the probe.
            rows: Numbers of its samples, which the step's own loss takes.

        Raises:
            MisconfigurationException: The loss is not known.

        Cost: a forward pass of the network; with the step's own loss one of the step, too.
        """
        loss = self.now(self._loss_fn)
        beside = targets if loss.own is None else rows
        if loss.fn is None or beside is None:
            why = loss.words if loss.fn is None else "no targets are known, Probe(target_fn=lambda batch: ...)"
            raise MisconfigurationException(
                f'Probe(outputs="loss"): {why}; pass loss_fn= to the callback, or Probe(outputs="trace")'
            )
        u = outputs()
        with isolated():
            if loss.own is not None:
                s = loss.own.derivatives(u, rows).slope
            else:
                s = evaluate(lambda at: loss.kind.evaluate(at, beside), u.double()).slope
        return s.double().reshape(len(s), -1)  # outputs may be one number per sample, (m,)

    def look_again(self, step: int) -> None:
        """Compare the loss with what was observed, at the same outputs; a change is said once.

        Args:
            step: Optimizer steps done.

        Cost: after the first measurement, a copy of the module and three evaluations on few samples.
        """
        kept = self._observed.kept
        if kept is None or self.changed or step == self._begun:
            return
        with isolated():
            differs = kept.changed(copy_of(self._trainer, self._trainer.lightning_module))
        if differs:
            self._give_up(f"it has changed since it was observed ({differs}, seen after step {step})")

    @property
    def compares(self) -> bool:
        """Whether the gradient of a step to come is compared with the observed loss, or is being compared now."""
        may = not self._compared and self._observed.kept is not None and not self.changed and is_compared(self._trainer)
        return may or self._gradient is not None

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Compute the gradient that the observed loss has in the run's next step, once per fit, where it can be compared.

        Args:
            batch: The batch of that step.
            batch_idx: Its number.
        """
        self._gradient = None
        kept = self._observed.kept
        if not self.compares or kept is None:
            return
        self._compared = True
        with (
            rarely_collected(),
            attempted(Exception),
        ):  # the step is any code of the user's; it could be run when it was observed
            self._gradient = RunGradient(self._trainer, kept, batch, batch_idx)

    def before_step(self, pl_module: pl.LightningModule) -> None:
        """Compare the run's gradient with the one that was computed before; a difference makes the loss unknown.

        Args:
            pl_module: The run's module, after its backward pass and its ``on_after_backward``.
        """
        gradient, self._gradient = self._gradient, None
        if gradient is not None and (reason := gradient.difference(pl_module)):
            self._give_up(reason)

    def leave(self) -> None:
        """Forget the copy of the module."""
        if self._observed.own is not None:
            self._observed.own.leave()

    def _give_up(self, reason: str) -> None:
        self.changed = reason
        rank_zero_warn(f"the loss of the training step: {reason}; from now on it is unknown")
