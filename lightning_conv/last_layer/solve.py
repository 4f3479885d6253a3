"""``solve_head``: the last layer's convex problem solved to a gap that is proven."""

from __future__ import annotations

import math
import time
from typing import get_args

import torch
from torch import Tensor

from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.search import Search, SolveMethod
from lightning_conv.last_layer.solution import HeadSolution, Judgement, SolutionVerdict
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.reporting.progress import progress_bar


def solve_head(
    problem: HeadProblem,
    *,
    tol: float = 1e-6,
    method: SolveMethod = "auto",
    start: tuple[Tensor, Tensor | None] | None = None,
    dtype: torch.dtype = torch.float32,
    max_iterations: int = 5000,
    progress: bool | None = None,
) -> HeadSolution:
    r"""Minimise :math:`L(W) = \frac1n \sum_i \ell(W^T [h_i, 1], y_i)` until the gap is proven to be at most ``tol``.

    Which gap: where the outputs that are needed are reachable (rank [h, 1] = n), L minus the infimum of the loss over
    *all* outputs, which no network undercuts. For narrower heads that one stays positive, and L minus the infimum over
    all heads on these features counts, whose lower bound comes from duality (``HeadDual``). ``reason`` says which one
    it is.

    - ``"lbfgs"``: from ``start``, mostly one pass over the features an iteration. With hard labels it changes the layer
      far less than prescribed outputs do (measured by benchmarks/last_layer.py).
    - ``"cholesky"``: the outputs are prescribed (``prescribed_outputs``), one Cholesky factor of the smaller Gram
      matrix gives the change of least norm that produces them. Exact, and of known duration; for squared loss the
      minimiser next to ``start``, of least squares for narrow heads.
    - ``"cg"``: conjugate gradients for squared loss, by passes only.
    - ``"auto"``: squared loss by Cholesky, or by conjugate gradients where its matrix does not fit or has no factor.
      Other losses by L-BFGS, and by Cholesky where that does not get there and rank n makes it possible. Absolute
      error, which has no gradient to follow, by Cholesky first.

    Args:
        problem: the head's.
        tol: gap that is asked for, in the units of the mean loss.
        method: see above.
        start: (weight, bias) to begin from; None: zeros.
        dtype: of the network that will hold the layer; the gap after rounding to it is what ``verdict`` is about.
        max_iterations: of L-BFGS or conjugate gradients.
        progress: show a bar on standard error; None: on a terminal, where it takes long.

    Returns:
        ``certified``: one of the gaps, with all rounding, is at most ``tol`` after the weights were rounded to
        ``dtype``. ``undecided`` otherwise, with the best layer that was found.

    Raises:
        ValueError: a tolerance or method that makes no sense, a start of another shape, or a method that cannot:
        ``"cg"``
            for other than squared losses, ``"cholesky"`` for the caller's own loss.
        SingularError: ``"cholesky"`` was asked for and [h, 1] is singular.
        MemoryError: ``"cholesky"`` was asked for and does not fit.

    Cost: 4 n D C flops a pass. L-BFGS takes some tens of passes from a trained layer. Cholesky: n D min(n, D) + min(n,
    D)^3 / 3.

    Example:
        >>> import torch
        >>> h = torch.eye(4, dtype=torch.float64)
        >>> problem = HeadProblem(h, torch.tensor([0, 1, 0, 1]), torch.nn.CrossEntropyLoss())
        >>> solution = solve_head(problem, tol=1e-6)
        >>> solution.verdict, solution.rounded_gap.upper <= 1e-6
        ('certified', True)
    """
    _require(problem, tol, method, dtype)
    began = time.perf_counter()
    w = problem.zeros() if start is None else problem.stack(*start)
    title = f"last layer, {problem.samples} x {problem.columns} x {problem.outputs_each}"
    with progress_bar(title, 100 * _pass_seconds(problem, w), progress) as report:
        search = Search(problem, w, tol, dtype, max_iterations, report)
        failure = search.run(method)
    judged, dual = search.judged, search.dual
    gap, head_gap = judged.rounded_gap, judged.rounded_head_gap
    verdict, reason = _verdict(judged, tol, dtype, failure)
    weight, bias = problem.split(search.w)
    return HeadSolution(
        verdict, reason, weight, bias, judged.loss, problem.infimum, judged.gap, dual, judged.head_gap, dtype,
        judged.rounded_loss, gap, head_gap, search.method, search.iterations, time.perf_counter() - began,
        float((search.w - w).norm()),
    )  # fmt: skip


def _require(problem: HeadProblem, tol: float, method: str, dtype: torch.dtype) -> None:
    if not 0 < tol < math.inf:
        raise ValueError(f"tol: {tol}; need a positive number, in the units of the mean loss")
    if method not in get_args(SolveMethod):
        raise ValueError(f"method: {method!r} is not one of {', '.join(get_args(SolveMethod))}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype}; need the floating type of the network, such as torch.float32")
    kind = problem.losses.kind
    if method == "cg" and kind != "squared":
        raise ValueError('method: "cg" is for squared loss; take "lbfgs"')
    if method == "cholesky" and kind == "custom":
        raise ValueError(
            'method: "cholesky" prescribes outputs, which are not known for the caller\'s own loss; take "lbfgs"'
        )


def _pass_seconds(problem: HeadProblem, w: Tensor) -> float:
    began = time.perf_counter()
    problem.loss_and_gradient(w)
    return time.perf_counter() - began


def _verdict(judged: Judgement, tol: float, dtype: torch.dtype, failure: str) -> tuple[SolutionVerdict, str]:
    name = str(dtype).removeprefix("torch.")
    gap, head_gap = judged.rounded_gap, judged.rounded_head_gap
    if gap is not None and gap.upper <= tol:
        words = f"the gap to the infimum over all outputs is at most {gap.upper:.3e} after rounding to {name}"
        return _as_proven(gap, words)
    if head_gap is not None and head_gap.upper <= tol:
        words = (
            f"the gap to the infimum over heads on these features is at most {head_gap.upper:.3e} after rounding to {name} "
            f"({head_gap.method})"
        )
        return _as_proven(
            head_gap, words if gap is None else f"{words}; to the infimum over all outputs it is {gap.value:.3e}"
        )
    if gap is None and head_gap is None:
        words = "no infimum of the loss is known, so there is no gap; pass infimum= to the problem"
    else:
        known = [found.upper for found in (gap, head_gap) if found is not None]
        words = f"the gap is at most {min(known):.3e} after rounding to {name}, not {tol:.1e}"
    return "undecided", f"{words} ({failure})" if failure else words


def _as_proven(gap: Bounded, words: str) -> tuple[SolutionVerdict, str]:
    return ("certified", words) if gap.certified else ("undecided", f"{words}, by numbers that are the caller's word")
