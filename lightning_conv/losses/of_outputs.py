"""A loss given as a function of the outputs alone: whether it is a sum over the samples, and whether it is a given loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

OutputLoss: TypeAlias = Callable[[Tensor], Tensor]
"""phi(u): the loss of a batch, a number with its graph, as a function of the outputs u, (n, ...)."""

SCALES = (0.1, 1.0, 10.0, 1000.0)
"""Sizes of random outputs, beside the present ones, in units of the larger of 1 and the present ones' root mean square."""
DESCENTS = 6
"""Steps down from the present outputs: a loss may differ only where it is small."""
MORE = 16
"""Steps where the loss falls slowly, as an absolute error does, until it is ``SMALL``."""
SMALL = 1e-3
"""Part of the present loss at which it counts as small."""
FAR = (2.0, 30.0)
"""Lengths of further steps down, in units of the first: the first one comes to the targets of a squared error, the second far beyond."""
ULPS = 64
"""Units of rounding by which two ways to compute the same loss may differ."""


@dataclass(frozen=True)
class Point:
    """phi at some outputs u."""

    outputs: Tensor
    value: float
    slope: Tensor  # s, the gradient by u
    unit: float  # eps of the coarser of the types of u and of the loss: torch gives some losses of float64 in the targets' float32

    @classmethod
    def of(cls, outputs: Tensor, loss: Tensor, slope: Tensor) -> Point:
        """Return phi at some outputs.

        Args:
            outputs: u.
            loss: phi(u).
            slope: Its gradient by u.
        """
        unit = max(torch.finfo(each.dtype).eps for each in (outputs, loss))
        return cls(outputs.detach(), float(loss.detach()), slope.detach(), unit)

    @property
    def finite(self) -> bool:
        """Whether value and gradient are finite."""
        return math.isfinite(self.value) and bool(torch.isfinite(self.slope).all())

    @property
    def size(self) -> float:
        """|phi| + sum |s u|, what one unit of rounding in u and in the sums changes phi by."""
        return abs(self.value) + float((self.slope * self.outputs).double().abs().sum())

    @property
    def steepness(self) -> float:
        """The sum of |s|."""
        return float(self.slope.double().abs().sum())


def rounding(own: Point, exact: Point, general: float) -> float:
    r"""Return by how much two ways to compute a loss psi may differ at a point: the first bound of ``difference``.

    Args:
        own: psi in the type of the outputs.
        exact: psi at the same outputs in float64.
        general: G, a sum of |s|.
    """
    eps, largest = own.unit, float(own.outputs.double().abs().max())
    return ULPS * eps * own.size + 4 * eps * largest * general + 4 * abs(own.value - exact.value)


def slope_rounding(own: Point, exact: Point, general: float | None = None) -> float:
    r"""Return by how much two ways to compute the gradient of a loss may differ, beside 64 units of its norm (``difference``).

    Args:
        own: psi in the type of the outputs.
        exact: psi at the same outputs in float64.
        general: G, a sum of |s|; None: that of ``own``.
    """
    eps = own.unit
    size = own.steepness if general is None else general
    return 4 * eps * size + 4 * float((own.slope.double() - exact.slope).norm())


def evaluate(loss: OutputLoss, outputs: Tensor) -> Point:
    """Evaluate phi and its gradient.

    Args:
        loss: phi.
        outputs: u.

    Raises:
        ValueError: The gradient by the outputs is missing: phi does not depend on them, or detaches them.
    """
    u = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = loss(u)
        (slope,) = torch.autograd.grad(value, u, allow_unused=True) if value.requires_grad else (None,)
    if slope is None:
        raise ValueError("the loss has no gradient by the outputs")
    return Point.of(u, value, slope)


def settings(loss: OutputLoss, outputs: Tensor, seed: int = 0) -> Iterator[Point]:
    r"""Yield phi at the present outputs, at random ones, and at some steps down from the present ones.

    A step down is that of Polyak for the infimum 0, :math:`u - (\phi / |s|^2) s`, shortened until phi falls; those that were too long are
    yielded, too, and some that are longer by ``FAR``: a loss that is held up at some value turns there.

    Args:
        loss: phi.
        outputs: u, the present ones.
        seed: Seed of the random ones.

    Cost: about 14 evaluations, and twice as many where the loss falls slowly.
    """
    present = evaluate(loss, outputs)
    yield present
    generator = torch.Generator().manual_seed(seed)
    size = max(1.0, float(outputs.detach().double().square().mean().sqrt()))
    size = size if math.isfinite(size) else 1.0
    for scale in SCALES:
        drawn = scale * size * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        yield evaluate(loss, drawn.to(outputs))
    if (rate := _polyak(present)) > 0:
        yield from (evaluate(loss, _moved(present, factor * rate)) for factor in FAR)
    point = present
    for taken in range(MORE):
        if taken >= DESCENTS and point.value < SMALL * present.value:
            return
        rate, found = _polyak(point), point
        for _ in range(4 if rate > 0 else 0):
            found = evaluate(loss, _moved(point, rate))
            yield found
            if found.finite and found.value < point.value:
                break
            rate /= 4
        if not (found.finite and found.value < point.value):
            return
        point = found


def _polyak(point: Point) -> float:
    """Return phi / |s|^2; 0 where there is no such step down."""
    length = float(point.slope.double().square().sum())
    return point.value / length if point.finite and 0 < length < math.inf and point.value > 0 else 0.0


def _moved(point: Point, rate: float) -> Tensor:
    return point.outputs - (rate * point.slope.double()).to(point.outputs)


def coupling(loss: OutputLoss, points: Sequence[Point], seed: int = 0) -> str:
    r"""Return how phi couples the samples of a batch; empty if :math:`\phi(u) = \sum_i \phi_i(u_i)` as far as it was tried.

    With the samples divided at random into A and B:

    - the curvature: S v, with v random on A and 0 on B, must be 0 on B (by a second derivative), up to ``ULPS`` units of rounding of
      what it is on A
    - the values: :math:`\phi(a, b) - \phi(a', b) - \phi(a, b') + \phi(a', b')` must be 0 up to ``ULPS`` units of rounding, for the
      outputs (a, b) and (a', b') of two points in turn. This finds a choice between samples, such as that of the hardest ones, whose
      second derivative does not show it.

    Args:
        loss: phi.
        points: Where it was evaluated; four of them, from the first to the last, are used.
        seed: Seed of the divisions.

    Cost: two second derivatives and two evaluations for each of the four.
    """
    samples = len(points[0].outputs)
    if samples < 2:
        return ""
    points = [points[k] for k in sorted({0, len(points) // 3, 2 * len(points) // 3, len(points) - 1})]
    generator = torch.Generator().manual_seed(seed)
    for point, other in zip(points, [*points[1:], points[0]], strict=True):
        order = torch.randperm(samples, generator=generator)
        some, rest = order[: samples // 2], order[samples // 2 :]
        for side, opposite in ((some, rest), (rest, some)):
            if (share := _curvature_across(loss, point, side, opposite, generator)) > 0:
                return f"the loss couples the samples of a batch (the curvature between two samples is {share:.2g} of that of one)"
        if len(points) > 1 and (apart := difference_across(loss, point, other, some)) > 0:
            return f"the loss couples the samples of a batch (what one half adds depends on the other half, by {apart:.2g})"
    return ""


def _curvature_across(
    loss: OutputLoss, point: Point, side: Tensor, opposite: Tensor, generator: torch.Generator
) -> float:
    """Return max |S v| on the other samples over max |S v| on these, v random on these; 0 where there is no second derivative."""
    u = point.outputs.clone().requires_grad_()
    v = torch.zeros_like(u)
    v[side] = torch.randn(u[side].shape, generator=generator, dtype=torch.float64).to(u)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(u), u, create_graph=True)
        if not slope.requires_grad:  # piecewise linear
            return 0.0
        (curved,) = torch.autograd.grad((slope * v).sum(), u, allow_unused=True)
    if curved is None or not bool(torch.isfinite(curved).all()):
        return 0.0
    across, own = (float(curved[rows].abs().max()) for rows in (opposite, side))
    share = across / max(own, across) if across > 0 else 0.0
    return share if share > ULPS * point.unit else 0.0


def difference_across(loss: OutputLoss, point: Point, other: Point, some: Tensor) -> float:
    r"""Return :math:`|\phi(a, b) - \phi(a', b) - \phi(a, b') + \phi(a', b')|`; 0 where rounding explains it.

    Args:
        loss: phi.
        point: phi at (a, b).
        other: phi at (a', b').
        some: Rows of a.

    Cost: two evaluations.
    """
    first, second = point.outputs.clone(), other.outputs.clone()
    first[some], second[some] = other.outputs[some], point.outputs[some]
    mixed = evaluate(loss, first), evaluate(loss, second)
    all_four = (point, other, *mixed)
    if not all(each.finite for each in all_four):
        return 0.0
    apart = abs(point.value + other.value - mixed[0].value - mixed[1].value)
    allowed = ULPS * point.unit * sum(each.size for each in all_four)
    return apart if apart > allowed else 0.0


def difference(points: Sequence[Point], reference: OutputLoss) -> str:
    r"""Return where phi differs from another loss, in value or gradient, by more than rounding explains; empty if nowhere.

    At every point, with eps of the type of u, or of the loss where that is coarser, and both losses in that type,

    .. math:: |\phi - \psi| \le 64\, \epsilon\, (|\psi| + \sum |s u|) + 4\, \epsilon\, \max|u|\, G + 4 |\psi - \psi_{64}|, \qquad
        |\nabla \phi - \nabla \psi| \le 64\, \epsilon\, |\nabla \psi| + 4\, \epsilon\, G + 4 |\nabla \psi - \nabla \psi_{64}|,

    where psi_64 is the other loss in float64, whose difference measures the rounding of such a loss, and G is the sum of |s| at the first
    point (a cross-entropy of confident outputs is rounded in units of its slope elsewhere).

    Args:
        points: phi at some outputs, from ``settings``.
        reference: psi.
    """
    general = points[0].steepness if points[0].finite else 0.0
    for point in points:
        own, exact = evaluate(reference, point.outputs), evaluate(reference, point.outputs.double())
        if not (exact.finite and own.finite):
            continue
        own = replace(own, unit=max(point.unit, own.unit))
        if not abs(point.value - own.value) <= rounding(own, exact, general):
            return f"{point.value:.9g} instead of {own.value:.9g}"
        apart = float((point.slope.double() - own.slope.double()).norm())
        allowed = ULPS * own.unit * float(own.slope.double().norm()) + slope_rounding(own, exact, general)
        if not apart <= allowed:
            return f"the same value, {point.value:.6g}, and another gradient"
    return ""
