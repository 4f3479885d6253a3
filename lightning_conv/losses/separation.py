"""``separation``: whether a loss of all outputs together is a sum over the samples; ``curvature_product``: its curvature S v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_conv.losses.of_outputs import ULPS, OutputLoss, Point, coupling, difference_across

EXACT_UP_TO = 128
"""Numbers n C up to which the curvature is computed whole."""

MIXED = 6
"""Points, about, between which values are mixed."""

NEAR = 1e-4
"""Relative difference of factors that rounding may cause."""


@dataclass(frozen=True)
class Separation:
    """Whether a loss is a sum over the samples, and how that was found.

    Attributes:
        reason: How the samples couple; empty: they do not, as far as it was tried.
        exact: Whether all second derivatives between different samples were computed, at two points. Otherwise the curvature was
            multiplied by random directions, each pair of samples apart at least once.
    """

    reason: str
    exact: bool

    @property
    def words(self) -> str:
        """How it was found that the samples do not couple."""
        return "by all second derivatives between samples" if self.exact else "by random directions of the outputs"


class GraphLoss:
    """A loss that is known by its graph alone: its value and derivatives, and how it depends on the batch.

    Args:
        depends: ``"mean"`` or ``"sum"`` over the samples, or ``"batch"``: a sum that something else which the batch determines divides.
        separated: How it was found that samples do not couple.
    """

    __name__ = "the step's own loss"

    def __init__(self, depends: str, separated: Separation) -> None:
        self.reduction, self.separated = depends, separated

    @property
    def scale_words(self) -> str:
        """How it depends on the batch, for a user."""
        of = {"mean": "a mean over the samples", "sum": "a sum over the samples"}
        return of.get(self.reduction, "a sum over the samples, divided by what the batch determines")


def curvature_product(loss: OutputLoss, outputs: Tensor, directions: Tensor) -> Tensor:
    r"""Return the curvature of a loss in some directions, :math:`S v = \nabla (s \cdot v)` with the gradient :math:`s = \nabla \phi`.

    Args:
        loss: phi.
        outputs: u, (n, ...).
        directions: v, in the shape of u, or (k, n, ...) for k of them.

    Returns:
        S v in the shape of ``directions``; zero where phi is piecewise linear.

    Raises:
        ValueError: phi does not depend on the outputs.
        RuntimeError: phi cannot be differentiated twice.

    Cost: one evaluation, and one backward pass through phi per direction.

    Example:
        >>> import torch
        >>> u, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])
        >>> curvature_product(lambda u: u.pow(3).sum(), u, v).tolist()  # 6 u v
        [[6.0], [0.0]]
    """
    u = outputs.detach().clone().requires_grad_()
    single = directions.ndim == u.ndim
    with torch.enable_grad():
        value = loss(u)
        if not value.requires_grad:
            raise ValueError("the loss has no gradient by the outputs")
        (slope,) = torch.autograd.grad(value, u, create_graph=True, allow_unused=True)
        if slope is None:
            raise ValueError("the loss has no gradient by the outputs")
        products = []
        for v in directions[None] if single else directions:
            found = None
            if slope.requires_grad:
                (found,) = torch.autograd.grad(slope, u, v.to(slope), retain_graph=True, allow_unused=True)
            products.append(torch.zeros_like(u) if found is None else found)
    made = torch.stack(products).detach()
    return made[0] if single else made


def separation(loss: OutputLoss, points: Sequence[Point], seed: int = 0) -> Separation:
    r"""Find out whether :math:`\phi(u) = \sum_i \phi_i(u_i)`, by its second derivatives and its values.

    - up to ``EXACT_UP_TO`` numbers: all entries of S are computed at the first and the last point, and those between different samples
      must be 0 up to ``ULPS`` units of rounding of the largest one
    - beyond: S v must be 0 on the samples where v is 0. The samples are divided by each binary digit of their numbers, so that each pair
      is apart at least once; v is random
    - always: ``coupling``, and the values between some points, since a choice between samples has no second derivative

    Args:
        loss: phi.
        points: Where it was evaluated.
        seed: Seed of the directions.

    Raises:
        RuntimeError: phi cannot be differentiated twice.

    Cost: ``coupling``, some twelve evaluations, and two evaluations with n C backward passes each, or 2 log2(n) of them.
    """
    numbers = points[0].outputs.numel()
    exact = numbers <= EXACT_UP_TO
    generator = torch.Generator().manual_seed(seed)
    for place in dict.fromkeys((0, len(points) - 1)):
        share = _largest_across(loss, points[place], generator, exact=exact)
        if share > ULPS * points[place].unit:
            why = f"the loss couples the samples of a batch (the curvature between two samples is {share:.2g} of the largest)"
            return Separation(why, exact)
    some = torch.randperm(len(points[0].outputs), generator=generator)[: len(points[0].outputs) // 2]
    every = max(1, len(points) // MIXED)
    for point, other in pairwise(points[::every]):
        if len(some) and (part := difference_across(loss, point, other, some)) > 0:
            why = (
                f"the loss couples the samples of a batch (what one half adds depends on the other half, by {part:.2g})"
            )
            return Separation(why, exact)
    return Separation(coupling(loss, points, seed), exact)


def _largest_across(loss: OutputLoss, point: Point, generator: torch.Generator, *, exact: bool) -> float:
    """Return the largest curvature between different samples over the largest of all; 0 where nothing is curved or finite."""
    u = point.outputs
    samples = len(u)
    if exact:
        directions = torch.eye(u.numel(), dtype=u.dtype, device=u.device).reshape(-1, *u.shape)
        held = torch.arange(samples).repeat_interleave(max(1, u.numel() // samples))
        moves = held[:, None] == torch.arange(samples)  # (k, n): the samples that a direction moves
    else:
        digits = range(max(1, (samples - 1).bit_length()))
        some = torch.stack([(torch.arange(samples) >> digit & 1).bool() for digit in digits])
        moves = torch.cat([some, ~some])
        drawn = torch.randn(len(moves), *u.shape, generator=generator, dtype=torch.float64).to(u)
        directions = drawn * moves.to(u).reshape(*moves.shape, *[1] * (u.ndim - 1))
    sizes = curvature_product(loss, u, directions).abs().reshape(len(moves), samples, -1).amax(2).cpu()
    if not bool(torch.isfinite(sizes).all()) or not float(sizes.max()) > 0:
        return 0.0
    return float(sizes[~moves].max()) / float(sizes.max()) if bool((~moves).any()) else 0.0


def common_factor(slopes: Tensor, others: Tensor) -> float | None:
    """Return the factor r with ``slopes = r others``, row by row; None: there is not one, or both are zero.

    A sum over samples, divided by something that depends on the batch, has in another batch the same slopes up to one factor.

    Args:
        slopes: s of some samples in one batch, (m, ...).
        others: s of the same samples at the same outputs in another one.
    """
    a, b = slopes.detach().double().flatten(), others.detach().double().flatten()
    size = float(b.square().sum())
    if not 0 < size < float("inf"):
        return None
    factor = float(a @ b) / size
    apart = float((a - factor * b).norm())
    return factor if apart <= NEAR * float(a.norm()) and factor > 0 else None


def is_same(now: Point, then: Point) -> bool:
    """Return whether a loss has, at the same outputs, the value and the gradient that it had, up to ``ULPS`` units of rounding.

    Args:
        now: phi as it is now.
        then: phi as it was.
    """
    apart = float((now.slope.double() - then.slope.double()).norm())
    allowed = ULPS * then.unit
    return abs(now.value - then.value) <= allowed * then.size and apart <= allowed * float(then.slope.double().norm())
