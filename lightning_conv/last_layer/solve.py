"""``solve_head``: solve the convex problem of the last layer to a proven gap."""

from __future__ import annotations

import math
import time
from typing import get_args

import torch
from torch import Tensor

from lightning_conv.checked import checked, real
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.search import Search, SolveMethod
from lightning_conv.last_layer.solution import HeadSolution, Judgement, SolutionVerdict
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.reporting.progress import progress_bar


@checked(tol=real(above=0))
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

    There are two gaps. If all outputs are reachable (rank [h, 1] = n), the gap is L minus the infimum of the loss over *all*
    outputs, below which no network can get. For narrower heads that gap stays positive. Then the gap is L minus the infimum
    over all heads on these features, whose lower bound comes from duality (``HeadDual``). ``reason`` says which one it is.

    - ``"lbfgs"``: L-BFGS from ``start``, mostly one pass over the features per iteration. With hard labels it changes the
      layer far less than prescribed outputs do (measured by benchmarks/last_layer.py).
    - ``"cholesky"``: outputs are prescribed (``prescribed_outputs``), and one Cholesky factor of the smaller Gram matrix
      gives the change of least norm that produces them. The method is exact and its duration is known. For squared loss it
      gives the minimiser closest to ``start``, for narrow heads the least-squares solution.
    - ``"cg"``: conjugate gradients for squared loss, with passes only.
    - ``"auto"``: for squared loss Cholesky, or conjugate gradients if the matrix does not fit or has no factor. For other
      losses L-BFGS, then Cholesky if L-BFGS does not reach the gap and rank n makes it possible. For absolute error, which
      has no useful gradient, Cholesky first.

    Args:
        problem: the problem of the head.
        tol: required gap, in the units of the mean loss.
        method: method of the list above.
        start: (weight, bias) of the start; None: zeros.
        dtype: floating type of the network that will hold the layer; ``verdict`` refers to the gap after rounding to it.
        max_iterations: maximum number of iterations of L-BFGS or conjugate gradients.
        progress: whether to show a bar on standard error; None: on a terminal, if it takes long.

    Returns:
        The solution. ``certified``: one of the gaps, with all rounding, is at most ``tol`` after the weights were rounded to
        ``dtype``. ``undecided`` otherwise, with the best layer that was found.

    Raises:
        ValueError: the tolerance or the method is not valid, the start has another shape, or the method does not support
            the loss: ``"cg"`` needs squared loss, ``"cholesky"`` one of torch's losses; or the features are refused by
            ``HeadProblem.require_moderate``.
        SingularError: the method is ``"cholesky"`` and [h, 1] is singular.
        MemoryError: the method is ``"cholesky"`` and its matrix does not fit.

    Cost: 4 n D C flops per pass. L-BFGS takes some tens of passes from a trained layer. Cholesky takes
    n D min(n, D) + min(n, D)^3 / 3 flops.

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
    verdict, reason = _verdict(search.judged, tol, dtype, failure)
    weight, bias = problem.split(search.w)
    return HeadSolution(
        verdict=verdict,
        reason=reason,
        weight=weight,
        bias=bias,
        infimum=problem.infimum,
        head_infimum=search.dual,
        dtype=dtype,
        method=search.method,
        iterations=search.iterations,
        seconds=time.perf_counter() - began,
        distance=float((search.w - w).norm()),
        **vars(search.judged),
    )


def _require(problem: HeadProblem, tol: float, method: str, dtype: torch.dtype) -> None:
    if not 0 < tol < math.inf:
        raise ValueError(f"tol: {tol}; need a positive number, in the units of the mean loss")
    if method not in get_args(SolveMethod):
        raise ValueError(f"method: {method!r} is not one of {', '.join(get_args(SolveMethod))}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype}; need the floating type of the network, such as torch.float32")
    problem.require_moderate()
    kind = problem.losses.kind
    if method == "cg" and kind != "squared":
        raise ValueError('method: "cg" needs a squared loss; use "lbfgs"')
    if method == "cholesky" and kind == "custom":
        raise ValueError(
            'method: "cholesky" prescribes outputs, which are not known for the caller\'s own loss; use "lbfgs"'
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
        words = "no infimum of the loss is known, so the gap is not known; pass infimum= to the problem"
    else:
        known = [found.upper for found in (gap, head_gap) if found is not None]
        words = f"the gap is at most {min(known):.3e} after rounding to {name}, not {tol:.1e}"
    return "undecided", f"{words} ({failure})" if failure else words


def _as_proven(gap: Bounded, words: str) -> tuple[SolutionVerdict, str]:
    return ("certified", words) if gap.certified else ("undecided", f"{words}, based on numbers given by the caller")
