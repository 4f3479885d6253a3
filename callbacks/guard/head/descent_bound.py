"""``DescentBound``: what the gap of the head provably is at most while plain full-batch gradient steps are taken, of whatever rule."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.head.step_rounding import relative_error, step_rounding
from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import (
    Comparator,
    HeadCurvature,
    HeadProblem,
    comparators,
    gradient_descent_bound,
    linear_bound,
    rounded_bound,
)
from lightning_conv.linalg.eigenvalues.bounded import Bounded, divide
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD

OFTEN = 64
"""Every so many steps one is compared with the exact gradient, and while there are few steps at powers of two."""
STRAY = 1e-2
"""Part of its length by which a compared step may be off, beside rounding: beyond, it is a step of something else than L."""
CHARGED = 2.0
"""Factor on the larger of two compared steps' errors, which the steps between them are charged with."""


def plan_bound(
    problem: HeadProblem, start: Tensor, curvature: HeadCurvature, certificate: RankCertificate | None
) -> dict[str, Any]:
    """What the bounds take, of the head as it is now; or ``no_bound``, why there is none.

    Args:
        problem: the head's.
        start: W_0.
        curvature: of the problem.
        certificate: of the trunk; its sigma_min gives the linear rate.

    Cost: see ``comparators``.
    """
    if problem.infimum is None:
        return {"no_bound": "the infimum of the loss is not known; pass infimum="}
    plan: dict[str, Any] = {"gap": max(problem.value(start).upper - problem.infimum.lower, 0.0), "comparators": []}
    try:
        found = comparators(problem, start)
    except (ArithmeticError, MemoryError, ValueError) as error:
        plan["no_bound"] = f"{type(error).__name__}: {error}"
    else:
        plan["comparators"] = [[c.excess, c.distance] for c in found]
    proven = certificate is not None and certificate.verdict == "certified"
    sigma = certificate.sigma_min if certificate is not None and proven else None
    if problem.losses.kind == "squared" and sigma is not None:
        plan["mu"] = curvature.smoothness / problem.samples * sigma.lower**2
    return plan


class DescentBound:
    r"""Counts the steps of a plan and knows what the theorem says after them.

    .. math:: L(w_t) - L^* \le \min_w L(w) - L^* + \frac{|w_0 - w|^2}{2 \sum \eta_k},
        \qquad \text{squared loss: also } \prod (1 - \eta_k \mu)^2 (L(w_0) - L^*), \qquad \eta_k \le \frac1{L_H}.

    Steps err: the features that the run computes, its gradient and its weights are rounded. Some of them are compared with the exact
    step, :math:`d_k = |w_{k+1} - w_k + \eta_k \nabla L(w_k)|_F` in float64 (one pass over the features); those in between are charged
    with twice the larger of the compared ones. That is an estimate, and goes into ``rounded`` (``rounded_bound``), not into ``bound``.

    A compared step that is off by more than 1 % of its length and than ``step_rounding`` explains was not made of the gradient of L:
    something changed that (a hook, a callback, a loss with another gradient). It ends what is proven.

    Args:
        problem: the head's.
        memory: with a plan of ``plan_bound``; kept in the checkpoint, and counted on here.
        curvature: L_H, at most.
        weight: of the head, for its type and device.
    """

    def __init__(
        self, problem: HeadProblem, memory: MutableMapping[str, Any], curvature: float, weight: Tensor
    ) -> None:
        self._problem, self._memory, self._curvature = problem, memory, curvature
        self._comparators = [Comparator(*pair) for pair in memory.get("comparators", [])]
        # Steps of a checkpoint that counted nothing else are not known to have erred little.
        memory.setdefault("drift", math.inf if memory.get("taken", 0) else 0.0)
        for name, start in (("taken", 0), ("total", 0.0), ("logarithm", 0.0), ("error", 0.0), ("largest", 0.0)):
            memory.setdefault(name, start)
        self._relative = relative_error(weight)
        self._exact: Tensor | None = None  # w_k - eta_k grad L(w_k)
        self._length = self._rounding = 0.0  # of that step
        self._left: Tensor | None = None  # W as the last step left it

    @property
    def taken(self) -> int:
        """Steps since the plan was made."""
        return int(self._memory["taken"])

    def before(self, w: Tensor, eta: float) -> None:
        """Before a step from W of that size: now and then its exact outcome is computed.

        Args:
            w: W, (D, C), float64.
            eta: of the step.
        """
        self._require_unmoved(w)
        due = self.taken % OFTEN == 0 or (self.taken & (self.taken - 1)) == 0
        self._exact = None
        if due:
            loss, gradient = self._problem.loss_and_gradient(w)
            self._exact, self._length = w - eta * gradient, eta * float(gradient.norm())
            self._rounding = step_rounding(self._problem, w, loss, eta, self._relative)

    def after(self, w: Tensor, eta: float) -> str | None:
        """A step was taken; what to say if it was none on L.

        Args:
            w: W after it, compared where ``before`` computed what it should be.
            eta: of the step.
        """
        memory, mu, said = self._memory, self._memory.get("mu"), None
        self._left = w
        if self._exact is not None:
            error, self._exact = float((w - self._exact).norm()) * OUTWARD, None
            # What came since the last comparison was charged with that one alone.
            memory["drift"] += error + CHARGED * max(error - memory["error"], 0.0) * (
                self.taken - memory.get("compared", -1) - 1
            )
            memory["error"], memory["compared"] = error, self.taken
            if not error <= max(STRAY * self._length, self._rounding):
                share = divide(error, self._length)
                said = f"a step was not -eta grad L of the training set (it is off by {share:.2g} of its length)"
                self.give_up(said)
        else:
            memory["drift"] += CHARGED * memory["error"]
        memory["taken"] += 1
        memory["total"] += eta
        memory["largest"] = max(memory["largest"], eta)
        if mu is not None:
            memory["logarithm"] += 2 * math.log1p(-eta * mu) if eta * mu < 1 else -math.inf
        return said

    def numbers(self, w: Tensor, value: Bounded | None = None) -> dict[str, float]:
        """For an entry of the history: the bound and, of the problem in float64, the gap; empty where nothing is proven.

        Args:
            w: W now.
            value: L(W), where it is known already.
        """
        self._require_unmoved(w)
        bound, infimum = self.bound(), self._problem.infimum
        if bound is None or infimum is None:
            return {}
        value = self._problem.value(w) if value is None else value
        return {
            "bound": bound,
            "bound_rounded": rounded_bound(bound, self._memory["drift"], self._curvature),
            "head_gap": value.value - infimum.value,
            "head_gap_lower": value.lower - infimum.upper,
            "head_steps": float(self.taken),
        }

    def _require_unmoved(self, w: Tensor) -> None:
        if self._left is not None and not torch.equal(w, self._left):
            self.give_up("something moved the head between two steps")

    def bound(self) -> float | None:
        """L(w_t) - L*, at most, after the steps that were taken; None: nothing is proven."""
        memory, taken = self._memory, self.taken
        if "gap" not in memory or memory.get("given_up"):
            return None
        known = [memory["gap"]]  # the loss never rises
        total = memory["total"] * (1 - (taken + 1) * 2.0**-52)  # the rounding of the sum
        moved = total > 0  # steps of rate 0 change nothing
        if self._comparators and moved:
            known.append(gradient_descent_bound(self._comparators, total, 1))
        if "mu" in memory and moved:
            even = memory["largest"] * taken <= memory["total"] * (1 + 1e-12)
            if even:
                known.append(linear_bound(memory["gap"], memory["largest"], memory["mu"], taken))
            else:
                known.append(memory["gap"] * math.exp(memory["logarithm"] * (1 - taken * 2.0**-52)))
        finite = [bound for bound in known if math.isfinite(bound)]
        return min(finite) if finite else None

    def give_up(self, why: str) -> None:
        """From now on nothing is proven of these steps."""
        self._memory.setdefault("given_up", why)
