"""The run's own optimizer where it is plain full-batch gradient descent on the head: its steps have a proven bound, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.run_checks import ROUNDED
from lightning_conv.callbacks.guard.head.bounded_steps import BoundedSteps
from lightning_conv.callbacks.guard.head.problem import TrainedHead, head_memory, holds_features
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.steps import Parameters, Steps, describe_optimizer, describe_steps
from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import HeadCurvature
from lightning_conv.machine.gemm import calibrated
from lightning_conv.networks.head import Head
from lightning_conv.networks.precision import in_float64

AGREEMENT = 1e-4  # part of a step's length by which it may differ from -eta grad, beside the rounding of the weights
TOO_LARGE = "the features do not fit into memory beside the run; step_rule='certified' gives a bound all the same"
AFFORDED = 30.0  # predicted seconds at the switch that a bound may take for which the user did not ask
SHARE = 0.5  # of the calibrated rate of products that they reach


class PlainSteps(BoundedSteps):
    r"""The optimizer of the run goes on; each of its steps is checked, and counted.

    Every step must be :math:`w - \eta g` with the run's own gradient g, and :math:`\eta \le 1 / L_H`. From the first one that is not,
    nothing is proven any more.

    Args:
        view: The run.
        head: Head of the run.
        memory: Memory of the rule in the checkpoint.
        certificate: Certificate of the trunk.

    Raises:
        ValueError: No Lipschitz constant of the loss's gradient is known.

    Cost: once, a dozen passes over the features and what ``comparators`` takes; the features are held meanwhile and afterwards (where they
    fit). A step costs a copy of the head.
    """

    def __init__(
        self, view: GuardView, head: TrainedHead, memory: dict[str, Any], certificate: RankCertificate | None
    ) -> None:
        super().__init__(view, head, memory, {}, certificate)
        self._due: tuple[list[Tensor], list[Tensor], float] | None = None  # weights, gradients, rate of a step to come

    def _rule(self, given: dict[str, Any], curvature: HeadCurvature) -> dict[str, Any]:
        return {"rule": "base", "asked": "base", "whole": True, "allowed": curvature.step}

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep what the step should be made of.

        Args:
            optimizer: Optimizer of the run.
        """
        self._due = None
        if "given_up" not in self._memory:
            with self._withdrawn_on_error():
                self._keep(optimizer)

    @contextmanager
    def _withdrawn_on_error(self) -> Iterator[None]:
        """Let an error withdraw the bound and do nothing else to the run."""
        with attempted(MemoryError) as attempt, torch.no_grad():
            yield
        if attempt.failed:
            self._due = None
            self.give_up(f"a step could not be followed ({attempt.reason})")

    def _keep(self, optimizer: Optimizer) -> None:
        steps, allowed = describe_head_steps(optimizer, self._view.head), self._memory["allowed"]
        gradients = [parameter.grad for parameter in self._head.parameters]
        present = [gradient.detach().clone() for gradient in gradients if gradient is not None]
        if (rate := steps.rate) is None:
            self.give_up(steps.reason)
        elif rate > allowed:
            self._memory["largest"] = max(self._memory["largest"], rate)
            self.give_up(f"the learning rate {rate:.4g} is above 1 / L_H = {allowed:.4g}, up to which there is a proof")
        elif len(present) < len(gradients):
            self.give_up("a step came without a gradient of the head")
        else:
            self.expect(rate)
            self._due = [parameter.detach().clone() for parameter in self._head.parameters], present, rate

    def after_step(self) -> str | None:
        """Compare what the optimizer did with w - eta g."""
        due, self._due = self._due, None
        if due is not None:
            with self._withdrawn_on_error():
                return self._compare(*due)
        return None

    def _compare(self, before: list[Tensor], gradients: list[Tensor], rate: float) -> str | None:
        for parameter, was, gradient in zip(self._head.parameters, before, gradients, strict=True):
            if not is_step(parameter, was, gradient, rate):
                self.give_up("a step of the optimizer was not w - eta grad")
                return None
        return self.count(rate)

    def measure(self) -> dict[str, float]:
        """Return loss and gap of the network, and the proven bound."""
        found = super().measure()
        with self._withdrawn_on_error():
            return found | self.numbers()
        return found


def is_step(weight: Tensor, was: Tensor, gradient: Tensor, rate: float) -> bool:
    """Return whether a tensor is was - rate * gradient, up to rounding in its type.

    Args:
        weight: The tensor after the step.
        was: The tensor before it.
        gradient: The gradient by it.
        rate: eta.
    """
    now, before, step = in_float64(weight), in_float64(was), rate * in_float64(gradient)
    rounding = torch.finfo(weight.dtype).eps * float(before.norm() + step.norm())
    return float((now - before + step).norm()) <= AGREEMENT * float(step.norm()) + rounding


def watched_steps(view: GuardView, state: GuardState) -> PlainSteps | str:
    """Return the run's own steps with their bound; or why there is none. All ranks come to the same.

    Args:
        view: The run.
        state: Memory of the guard; the plan is written into its ``steps``.
    """
    expects = (MemoryError, MisconfigurationException, RuntimeError, ValueError)
    with attempted(*expects) as attempt:
        why = _first(view.ranks.gather(lambda: "; ".join(state.caveats) or not_plain(view)))
        if why := why or _not_affordable(view):
            return why
        # Said before the features are computed: that takes a pass through the trunk in float64.
        if not holds_features(view, allowed := head_memory(view.ranks)):
            return TOO_LARGE
        head = TrainedHead(view, allowed)
        return head.narrow or PlainSteps(view, head, state.steps, state.certificate)
    return f"no bound could be set up ({attempt.reason})"


def describe_head_steps(optimizer: Optimizer, head: Head) -> Steps:
    """Describe what the optimizer's own rule does to the head: the rate at which it is plain gradient descent, or why it is not.

    Args:
        optimizer: Optimizer of the run.
        head: Head of its network.
    """
    return describe_optimizer(optimizer, [each for each in head.module.parameters() if each.requires_grad])


def not_plain(view: GuardView) -> str:
    """Return why the steps of the run are not full-batch gradient descent on a mean loss of the head; empty if they are.

    Each rank looks at its own part of the run, and does not communicate.

    Args:
        view: The run.
    """
    trainer, loss = view.trainer, view.loss
    if loss.loss_fn is None:
        return "the loss is not known; pass loss_fn= to the guard"
    if not view.head.last:
        return "something follows the head, so that the loss of its own outputs is not known"
    if not loss.kind.averaged:
        return f"{loss.kind.name} is not the mean over the samples"
    trained = {name: each for name, each in view.head.module.named_parameters() if each.requires_grad}
    if why := describe_steps(trainer, Parameters(trained), accumulated=True, compared=True).reason:
        return why
    if str(trainer.precision) in ROUNDED:
        return f"the gradients are rounded (precision {str(trainer.precision)!r})"
    return view.not_whole


def _not_affordable(view: GuardView) -> str:
    """Return why plain steps get no bound all the same: no L_ell, or it takes too long; empty if they do."""
    view.loss.targets()  # by all ranks together; what comes after is local

    def mine() -> str:
        if view.loss.smoothness() is None:
            return f"{view.loss.kind.name} has no Lipschitz gradient that is known"
        if (seconds := predicted_seconds(view.data.size, view.head.width + view.head.has_bias)) > AFFORDED:
            return (
                f"the bound would take about {seconds:.0f} s at the switch; step_rule='certified' gives it all the same"
            )
        return ""

    return _first(view.ranks.gather(mine))


def predicted_seconds(samples: int, columns: int) -> float:
    """Return roughly how long the smaller Gram matrix of [h, 1] and its Cholesky factor take.

    Args:
        samples: n.
        columns: D.
    """
    smaller = min(samples, columns)
    flops = 2.0 * samples * columns * smaller + smaller**3 / 3
    return flops / (SHARE * calibrated("cpu", torch.float64, torch.get_num_threads())[1])


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")
