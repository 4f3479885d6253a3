"""The search for a last layer with a small gap: the order of the methods and when to stop."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.last_layer.dual import DualBound, HeadDual
from lightning_conv.last_layer.gram import SingularError, least_change
from lightning_conv.last_layer.iterations import Iterate, conjugate_gradients, lbfgs
from lightning_conv.last_layer.prescribed import prescribed_outputs
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.solution import judge
from lightning_conv.reporting.progress import Report, part

SolveMethod: TypeAlias = Literal["auto", "cholesky", "lbfgs", "cg"]

AIM = 0.5
"""Share of ``tol`` that an iteration aims at, so that the gap stays below ``tol`` after the weights are rounded."""

NARROW_CHECK = 10
"""A head that seems too narrow is compared with its dual bound whenever the gradient has fallen by this factor."""

FAR = 300.0
"""The infimum counts as out of reach if a head of this many times the norm of W (plus 1) would be needed."""


class Search:
    """Search for a head with a small gap: the best layer so far, its proven bounds, and the methods that improve it.

    Args:
        problem: the problem of the head.
        start: initial last layer W_0, (D, C).
        tol: required gap, in the units of the mean loss.
        dtype: floating type of the network.
        max_iterations: maximum number of iterations of L-BFGS or conjugate gradients.
        report: called with the share of the work that is done.

    Attributes:
        w: best layer so far, (D, C).
        judged: proven bounds of the loss and the gaps of ``w``.
        dual: lower bound of the loss over all heads; None until one is computed.
        method: method that found the layer.
        iterations: number of iterations of the last iterative method.
    """

    def __init__(
        self, problem: HeadProblem, start: Tensor, tol: float, dtype: torch.dtype, max_iterations: int, report: Report
    ) -> None:
        self.problem, self.start, self.tol, self.dtype = problem, start, tol, dtype
        self.max_iterations, self.report = max_iterations, report
        self.w, self.method, self.iterations = start, "none needed", 0
        self.dual: DualBound | None = None
        self._dual: HeadDual | None = None
        self._no_dual = False
        self.judged = judge(problem, start, None, dtype)

    @property
    def done(self) -> bool:
        """Whether one of the two gaps is at most ``tol``."""
        return self.judged.best() <= self.tol

    @property
    def narrow(self) -> bool:
        """Whether there are fewer columns than samples, so that some outputs cannot be reached."""
        return self.problem.samples > self.problem.columns

    def run(self, method: SolveMethod) -> str:
        """Try the methods until one reaches the gap.

        Args:
            method: the only method to try, or ``"auto"``.

        Returns:
            The failures on the way, as a text for the reason of the verdict.
        """
        if self.done:
            return ""
        if method != "auto":
            return self._take(method, asked=True)
        failures = []
        for each in self._order():
            if failure := self._take(each, asked=False):
                failures.append(failure)
            if self.done:
                break
        return "; ".join(failures)

    def _order(self) -> list[SolveMethod]:
        losses = self.problem.losses
        if losses.kind == "squared":
            return ["cholesky", "cg"]
        if losses.kind == "custom" or (self.narrow and losses.lipschitz is None):
            return ["lbfgs"]
        # If the infimum lies at infinity, L-BFGS takes some tens of steps. To a finite minimiser it converges slowly if
        # sigma_min is small.
        return ["cholesky", "lbfgs"] if losses.attained else ["lbfgs", "cholesky"]

    def _take(self, method: SolveMethod, *, asked: bool) -> str:
        if method == "cholesky":
            try:
                self._cholesky()
            except (SingularError, MemoryError) as error:
                if asked:
                    raise
                return str(error)
            return "" if self.done else "cholesky did not reach the gap"
        self._iterate(method)
        return "" if self.done else f"{method} ended after {self.iterations} iterations"

    def _offer(self, w: Tensor, method: str) -> None:
        """Replace the best layer by W if its loss is no larger, or if its gap is at most ``tol``."""
        found = judge(self.problem, w, self.dual, self.dtype)
        if found.loss.value <= self.judged.loss.value or found.best() <= self.tol:
            self.w, self.judged, self.method = w, found, method

    def _bound_from_below(self) -> None:
        """Bound the infimum over heads from below, starting from the best W."""
        if self._dual is None and not self._no_dual:
            try:
                self._dual = HeadDual(self.problem)
            except (ValueError, MemoryError):
                self._no_dual = True
        found = None if self._dual is None else self._dual.bound(self.w)
        if found is not None and (self.dual is None or found.lower > self.dual.lower):
            self.dual = found
            self.judged = judge(self.problem, self.w, self.dual, self.dtype)

    def _cholesky(self) -> None:
        problem = self.problem
        with least_change(problem, part(self.report, 0, 0.9)) as solver:
            outputs = problem.outputs(self.start)
            if problem.losses.kind in ("squared", "elementwise"):
                self._offer(self.start + solver(problem.losses.targets - outputs), "cholesky")
            else:
                for aim in (AIM, AIM / 10, AIM / 100):
                    wanted = prescribed_outputs(problem.losses, outputs, aim * self.tol)
                    self._offer(self.start + solver(wanted - outputs), "cholesky")
                    if self.done:
                        break
        if not self.done:
            self._bound_from_below()
        self.report(1.0)

    def _out_of_reach(self, found: Iterate, gap: float) -> bool:
        """Return whether the infimum over all outputs seems out of reach: gap <= |gradient| |W - W'| for a minimiser W'."""
        return self.narrow or not gap <= FAR * found.gradient * (1 + float(found.w.norm()))

    def _iterate(self, method: SolveMethod) -> None:
        run = lbfgs if method == "lbfgs" else conjugate_gradients
        infimum = -math.inf if self.problem.infimum is None else self.problem.infimum.lower
        aim, first, checked = AIM * self.tol, math.nan, math.inf
        last = None
        for k, found in enumerate(run(self.problem, self.start)):
            last, self.iterations = found, k
            gap = found.loss - infimum
            first = gap if k == 0 else first
            if gap <= aim:
                self._offer(found.w, method)
                if self.done:
                    break
                aim /= 4  # rounding to the network's type raised the gap above tol
            elif self._out_of_reach(found, gap) and found.gradient <= checked / NARROW_CHECK:
                if k > 0:
                    self._offer(found.w, method)
                    self._bound_from_below()
                    if self.done:
                        break
                checked = found.gradient
            if 0 < gap < first and math.isfinite(first):
                self.report(min(1.0, math.log(first / gap) / math.log(first / aim)))
            if k >= self.max_iterations:
                break
        if last is not None and not self.done:
            self._offer(last.w, method)
            self._bound_from_below()
        self.report(1.0)
