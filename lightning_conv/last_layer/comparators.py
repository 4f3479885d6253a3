"""Comparators: last layers of known loss and distance from the start, which the bound of gradient descent needs."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_conv.checked import checked, real
from lightning_conv.last_layer.bounds import Comparator
from lightning_conv.last_layer.gram import LeastChange, least_change
from lightning_conv.last_layer.prescribed import prescribed_outputs
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.rounding import frobenius, gamma, unit_roundoff
from lightning_conv.reporting.progress import Report, part, silent

PRESCRIBED = 6
SCALES = (1.05, 1.1, 1.2, 1.4, 1.8, 2.6, 4.2, 7.4)


@checked(floor=real())
def comparator(problem: HeadProblem, start: Tensor, w: Tensor, floor: float | None = None) -> Comparator:
    """Compute the excess loss of W = ``w`` and its distance from ``start``, with rounding included.

    Args:
        problem: the problem of the head.
        start: last layer W_0 at the switch, (D, C).
        w: any matrix of that shape.
        floor: a lower bound of the infimum with which L is compared; None: that of the loss, ``problem.infimum``.

    Raises:
        ValueError: no infimum is known.

    Cost: one pass.
    """
    if floor is None:
        if problem.infimum is None:
            raise ValueError("infimum: not known for this loss; pass infimum= to the problem, or floor=")
        floor = problem.infimum.lower
    change = w - start
    # The difference is rounded too, by a relative u per entry.
    distance = frobenius(change) * (1 + gamma(w.numel() + 4, w.dtype)) * (1 + 2 * unit_roundoff(w.dtype))
    excess = problem.value(w).upper - floor
    return Comparator(max(excess, 0.0) * OUTWARD if excess > 0 else 0.0, distance)


@checked(smallest=real(above=0))
def comparators(
    problem: HeadProblem,
    start: Tensor,
    *,
    solver: LeastChange | None = None,
    smallest: float = 1e-9,
    report: Report = silent,
) -> list[Comparator]:
    r"""Compute a small family of comparators for ``gradient_descent_bound``, from W_0 itself to nearly the infimum.

    - W_0 itself.
    - If the infimum is not attained, as for cross-entropy: multiples s W_0, at distance (s - 1) |W_0|. If all samples are
      classified correctly, their loss comes arbitrarily close to the infimum.
    - Otherwise, or if these do not reach ``smallest``: for excesses from half the current gap to ``smallest``, the
      least-norm change of W_0 whose outputs have :math:`\ell_i - \inf \ell_i \le \delta` (``prescribed_outputs``). With
      rank [h, 1] = n these outputs are reached; for squared loss this is the minimiser closest to W_0.

    Loss and distance are computed at each matrix itself, so they are proven no matter how the matrix was found.

    Args:
        problem: the problem of the head, with one of torch's losses.
        start: last layer W_0 at the switch, (D, C).
        solver: a solver from ``least_change``, if one exists already.
        smallest: smallest excess L - inf L to aim at.
        report: called with the share of the work that is done.

    Raises:
        SingularError: the multiples of W_0 do not suffice, and [h, 1] is numerically singular.
        MemoryError: the multiples of W_0 do not suffice, and the Gram matrix of [h, 1] does not fit.

    Cost: one pass for each multiple; otherwise the Gram matrix, its factor, and three passes for each of six excesses.
    """
    stay = comparator(problem, start, start)
    found = [stay]
    if not problem.losses.attained:
        for scale in SCALES:
            scaled = comparator(problem, start, start * scale)
            if scaled.excess >= stay.excess:
                break
            found.append(scaled)
            if scaled.excess <= smallest:
                return found
    if solver is None:
        with least_change(problem, part(report, 0, 0.5)) as made:
            return found + _prescribed(problem, start, made, smallest, part(report, 0.5, 0.5), stay)
    return found + _prescribed(problem, start, solver, smallest, report, stay)


def _prescribed(
    problem: HeadProblem, start: Tensor, solver: LeastChange, smallest: float, report: Report, stay: Comparator
) -> list[Comparator]:
    outputs, found = problem.outputs(start), []
    largest = max(stay.excess / 2, smallest)
    for k in range(PRESCRIBED):
        excess = largest * math.exp(math.log(smallest / largest) * k / (PRESCRIBED - 1))
        change = solver(prescribed_outputs(problem.losses, outputs, excess) - outputs, refine=False)
        found.append(comparator(problem, start, start + change))
        report((k + 1) / PRESCRIBED)
    return found
