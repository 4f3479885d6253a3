"""``BoundedSteps``: a proven bound of the head's gap while plain full-batch gradient steps are taken, by whatever rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.head.problem import TrainedHead
from lightning_conv.callbacks.guard.head.step_rounding import relative_error, step_rounding
from lightning_conv.callbacks.guard.head.steps import HeadSteps
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import (
    Comparator,
    HeadCurvature,
    comparators,
    gradient_descent_bound,
    head_curvature,
    linear_bound,
    rounded_bound,
)
from lightning_conv.linalg.eigenvalues.bounded import Bounded, divide
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD

# Every so many steps one is compared with the exact gradient; so are the steps whose number is a power of two.
OFTEN = 64
STRAY = 1e-2  # part of its length by which a compared step may be off, beside rounding: beyond, it is not a step on L
CHARGED = 2.0  # factor on the larger of two compared steps' errors, which the steps between them are charged with


class BoundedSteps(HeadSteps, ABC):
    r"""Steps of a plan; they are counted, and their gap has a bound while all of them are plain full-batch gradient steps.

    .. math:: L(w_t) - L^* \le \min_w L(w) - L^* + \frac{|w_0 - w|^2}{2 \sum \eta_k},
        \qquad \text{squared loss: also } \prod (1 - \eta_k \mu)^2 (L(w_0) - L^*), \qquad \eta_k \le \frac1{L_H}.

    Steps err: the features that the run computes, its gradient and its weights are rounded. Some steps are compared with the exact
    one, :math:`d_k = |w_{k+1} - w_k + \eta_k \nabla L(w_k)|_F` in float64 (one pass over the features); those in between are charged
    with twice the larger of the compared errors. That is an estimate, and goes into ``bound_rounded`` (``rounded_bound``), not into
    ``bound``.

    A compared step that is off by more than 1 % of its length and than ``step_rounding`` explains was not made of the gradient of L:
    something changed it (a hook, a callback, a loss with another gradient). It ends what is proven.

    The plan is made once and kept in the checkpoint, with the counts. A run that resumes with other batches or another loss gets a new one.

    Args:
        view: The run.
        head: Head of the run.
        memory: Memory of the rule in the checkpoint. The plan: ``given``, ``curvature`` (L_H from below, its value, from above), ``gap``,
            ``comparators`` and ``mu``, or ``no_bound``. The counts: ``taken``, ``total``, ``logarithm`` and ``largest`` of the steps;
            ``error`` and ``compared`` of the last comparison; ``drift``. And ``given_up``, the reason why nothing is proven any more.
        given: What the plan rests on beside the head and the loss.
        certificate: Certificate of the trunk, whose sigma_min gives the linear rate.

    Raises:
        ValueError: No Lipschitz constant of the loss's gradient is known.

    Cost: once, a dozen passes over the features and what ``comparators`` takes.
    """

    def __init__(
        self,
        view: GuardView,
        head: TrainedHead,
        memory: dict[str, Any],
        given: dict[str, Any],
        certificate: RankCertificate | None,
    ) -> None:
        super().__init__(view)
        self._head, self._memory = head, memory
        losses = head.problem.losses
        given |= {"samples": head.problem.samples, "loss": losses.kind, "smoothness": losses.smoothness}
        if memory.get("given") != given:
            memory.clear()
            memory |= view.ranks.gather(lambda: self._plan(given, certificate))[0]
        self._comparators = [Comparator(*pair) for pair in memory.get("comparators", [])]
        # Steps of a checkpoint that counted nothing else are not known to have erred little.
        memory.setdefault("drift", math.inf if memory.get("taken", 0) else 0.0)
        for name, start in (("taken", 0), ("total", 0.0), ("logarithm", 0.0), ("error", 0.0), ("largest", 0.0)):
            memory.setdefault(name, start)
        self._exact: Tensor | None = None  # w_k - eta_k grad L(w_k)
        self._length = self._rounding = 0.0  # of that step
        self._left: Tensor | None = None  # W as the last step left it

    @abstractmethod
    def _rule(self, given: dict[str, Any], curvature: HeadCurvature) -> dict[str, Any]:
        """Return what the plan holds of this rule; ``no_bound``: why its steps have no bound."""

    def _plan(self, given: dict[str, Any], certificate: RankCertificate | None) -> dict[str, Any]:
        problem, start = self._head.problem, self._head.w
        curvature = head_curvature(problem)
        bounds = [curvature.value.lower, curvature.value.value, curvature.value.upper]
        plan = {"given": given, "curvature": bounds, **self._rule(given, curvature)}
        if "no_bound" in plan:
            return plan
        if problem.infimum is None:
            return plan | {"no_bound": "the infimum of the loss is not known; pass infimum="}
        plan |= {"gap": max(problem.value(start).upper - problem.infimum.lower, 0.0), "comparators": []}
        try:
            plan["comparators"] = [[c.excess, c.distance] for c in comparators(problem, start)]
        except (ArithmeticError, MemoryError, ValueError) as error:
            plan["no_bound"] = f"{type(error).__name__}: {error}"
        sigma = certificate.sigma_min if certificate is not None and certificate.verdict == "certified" else None
        if sigma is not None and problem.losses.kind == "squared":
            plan["mu"] = curvature.smoothness / problem.samples * sigma.lower**2
        return plan

    def expect(self, eta: float) -> None:
        """Compute, now and then, the exact outcome of the step that comes.

        Args:
            eta: Size of the step.
        """
        w, taken, problem = self._unmoved(), self._memory["taken"], self._head.problem
        self._exact = None
        if taken % OFTEN == 0 or taken & (taken - 1) == 0:
            loss, gradient = problem.loss_and_gradient(w)
            self._exact, self._length = w - eta * gradient, eta * float(gradient.norm())
            self._rounding = step_rounding(problem, w, loss, eta, relative_error(self._head.parameters[0]))

    def count(self, eta: float) -> str | None:
        """Count a step that was taken.

        Args:
            eta: Size of the step.

        Returns:
            What to say if it was not a step on L, where ``expect`` has computed what it should be; otherwise None.
        """
        memory, said = self._memory, None
        self._left = self._head.w
        if self._exact is not None:
            error, self._exact = float((self._left - self._exact).norm()) * OUTWARD, None
            # What came since the last comparison was charged with that one alone.
            between = memory["taken"] - memory.get("compared", -1) - 1
            memory["drift"] += error + CHARGED * max(error - memory["error"], 0.0) * between
            memory["error"], memory["compared"] = error, memory["taken"]
            if not error <= max(STRAY * self._length, self._rounding):
                share = divide(error, self._length)
                said = f"a step was not -eta grad L of the training set (it is off by {share:.2g} of its length)"
                self.give_up(said)
        else:
            memory["drift"] += CHARGED * memory["error"]
        memory["taken"] += 1
        memory["total"] += eta
        memory["largest"] = max(memory["largest"], eta)
        if (mu := memory.get("mu")) is not None:
            memory["logarithm"] += 2 * math.log1p(-eta * mu) if eta * mu < 1 else -math.inf
        return said

    def numbers(self, value: Bounded | None = None) -> dict[str, float]:
        """Return the bound and, of the problem in float64, the gap, for the history; an empty dict where nothing is proven.

        Args:
            value: L(W), where it is known already.
        """
        w, problem = self._unmoved(), self._head.problem
        bound, infimum = self.bound(), problem.infimum
        if bound is None or infimum is None:
            return {}
        value = value or problem.value(w)
        return {
            "bound": bound,
            "bound_rounded": rounded_bound(bound, self._memory["drift"], self._memory.get("curvature", [math.inf])[-1]),
            "head_gap": value.value - infimum.value,
            "head_gap_lower": value.lower - infimum.upper,
            "head_steps": float(self._memory["taken"]),
        }

    def _unmoved(self) -> Tensor:
        """Return W, and withdraw the bound if something moved it since the last step."""
        w = self._head.w
        if self._left is not None and not torch.equal(w, self._left):
            self.give_up("something moved the head between two steps")
        return w

    def bound(self) -> float | None:
        """Return an upper bound of L(w_t) - L* after the steps that were taken; None: nothing is proven."""
        memory, taken = self._memory, self._memory["taken"]
        if "gap" not in memory or memory.get("given_up"):
            return None
        known = [memory["gap"]]  # the loss never rises
        total = memory["total"] * (1 - (taken + 1) * 2.0**-52)  # the rounding of the sum
        moved = total > 0  # steps of rate 0 change nothing
        if self._comparators and moved:
            known.append(gradient_descent_bound(self._comparators, total, 1))
        if "mu" in memory and moved:
            if memory["largest"] * taken <= memory["total"] * (1 + 1e-12):  # all steps are equal
                known.append(linear_bound(memory["gap"], memory["largest"], memory["mu"], taken))
            else:
                known.append(memory["gap"] * math.exp(memory["logarithm"] * (1 - taken * 2.0**-52)))
        return min((bound for bound in known if math.isfinite(bound)), default=None)

    def give_up(self, why: str) -> None:
        """Withdraw the bound for good.

        Args:
            why: The reason; the first one is kept.
        """
        self._memory.setdefault("given_up", why)
