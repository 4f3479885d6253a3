"""``CertifiedSteps``: gradient steps of a proven size in place of the optimizer's, for the head only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.run_checks import ROUNDED
from lightning_conv.callbacks.guard.head.bounded_steps import BoundedSteps
from lightning_conv.callbacks.guard.head.problem import TrainedHead
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import HeadCurvature, PowerSchedule, batch_curvature


class CertifiedSteps(BoundedSteps):
    r"""Plain gradient descent on the head, with steps for which phase 2 provably converges.

    If every optimizer step sees the whole training set: :math:`\eta = 1 / L_H`, and

    .. math:: L(w_t) - L^* \le \frac{L_H R^2}{2t}, \qquad \text{squared loss: also } (1 - \eta \mu)^{2t} (L(w_0) - L^*).

    Otherwise :math:`\eta_k = \eta_0 (1 + k / 1000)^{-3/4}` with :math:`\eta_0 = 1 / L_B`, L_B the largest curvature that a mini-batch
    can have: the sum of the steps is infinite, the sum of their squares finite.

    The gradient is the run's own (averaged over ranks and accumulated batches), before clipping. The step is made where the optimizer's
    would be, which finds no gradient and leaves the head alone.

    Args:
        view: The run.
        head: Head of the run.
        memory: Memory of the rule in the checkpoint.
        certificate: Certificate of the trunk.

    Raises:
        ValueError: No Lipschitz constant of the loss's gradient is known.
    """

    def __init__(
        self, view: GuardView, head: TrainedHead, memory: dict[str, Any], certificate: RankCertificate | None
    ) -> None:
        super().__init__(view, head, memory, view.ranks.broadcast(_what_a_step_sees(view, head)), certificate)
        self._gradients: list[Tensor | None] = []  # of the step that comes, before clipping
        self._expected: list[Tensor] | None = None
        self._said: str | None = None

    def _rule(self, given: dict[str, Any], curvature: HeadCurvature) -> dict[str, Any]:
        whole = given["whole"]
        first = curvature.step if whole else 1 / batch_curvature(self._head.problem, given["smallest"], curvature)
        plan = {"rule": "certified", "whole": whole, "first": first}
        if not whole:
            return plan | {"no_bound": self._view.not_whole}
        if not given["exact"]:
            precision = str(self._view.trainer.precision)
            return plan | {"no_bound": f"the gradients are rounded (precision {precision!r})"}
        return plan

    @property
    def step_size(self) -> float:
        """The size eta of the next step."""
        first: float = self._memory["first"]
        return first if self._memory["whole"] else PowerSchedule(first)(self._memory["taken"])

    def before_step(self, optimizer: Optimizer) -> None:
        """Remember the gradients before clipping.

        Args:
            optimizer: Optimizer of the run.
        """
        gradients = [parameter.grad for parameter in self._head.parameters]
        self._gradients = [None if each is None else each.detach().clone() for each in gradients]

    @torch.no_grad()
    def move_head(self) -> None:
        """Make the step w <- w - eta grad L and take the gradient away, so that the optimizer leaves the head alone."""
        parameters, memory = self._head.parameters, self._memory
        gradients, self._gradients = self._gradients, []
        if not gradients:  # the rule is in force since this step
            return
        present = [gradient for gradient in gradients if gradient is not None]
        # A gradient scaler leaves out the steps whose gradients overflow.
        if present and all(bool(torch.isfinite(gradient).all()) for gradient in present):
            eta, bounded = self.step_size, memory["whole"] and memory["given"]["exact"]
            if bounded:
                self.expect(eta)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.add_(gradient.to(parameter.dtype), alpha=-eta)
            if bounded:
                self._said = self.count(eta)
            else:
                memory["taken"] += 1
        for parameter in parameters:
            parameter.grad = None
        if memory["taken"] <= 2:
            self._expected = [parameter.detach().clone() for parameter in parameters]

    def after_step(self) -> str | None:
        """Return whether the optimizer moved the head, checked in the first steps, or what was wrong with the step itself."""
        expected, self._expected = self._expected, None
        said, self._said = self._said, None
        if expected is None or all(torch.equal(a, b) for a, b in zip(expected, self._head.parameters, strict=True)):
            return said
        return "the optimizer of the run moves the head although it has no gradient, so the certified steps are not the only ones"

    def measure(self) -> dict[str, float]:
        """Return loss, gap, the proven bound of the gap, and the step size: one pass over the features."""
        value = self._head.problem.value(self._head.w)
        return self._head.measure(value) | {"step_size": self.step_size} | self.numbers(value)


def _what_a_step_sees(view: GuardView, head: TrainedHead) -> dict[str, Any]:
    whole, infimum = not view.not_whole, head.problem.infimum
    smallest = head.problem.samples if whole else 1 if view.loss.kind.weighted else view.data.smallest_batch
    exact = str(view.trainer.precision) not in ROUNDED
    known = None if infimum is None else infimum.lower
    return {"whole": whole, "smallest": smallest, "exact": exact, "infimum": known}
