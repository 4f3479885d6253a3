"""``HeadSolution``: a last layer with proven bounds of its loss, in float64 and after rounding to the network's type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.last_layer.dual import DualBound
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.linalg.eigenvalues.bounded import Bounded

SolutionVerdict: TypeAlias = Literal["certified", "undecided"]


@dataclass(frozen=True)
class HeadSolution:
    """A last layer, and the gaps of its mean loss to the infimum over all outputs and to the infimum over all heads."""

    verdict: SolutionVerdict
    """Of the claim that one of the two gaps, after rounding to ``dtype``, is at most ``tol``."""
    reason: str
    weight: Tensor  # (C, m_H), float64
    bias: Tensor | None  # (C,), float64
    loss: Bounded
    infimum: Bounded | None  # (1/n) sum_i inf ell_i over all outputs; None: not known
    gap: Bounded | None  # loss - infimum, an upper bound of the possible gain of any network
    head_infimum: DualBound | None
    """A lower bound of the loss over all heads on these features; None: ``infimum`` is the only one."""
    head_gap: Bounded | None
    """Loss minus its infimum over heads: between 0 and the difference to the better of the two lower bounds."""
    dtype: torch.dtype  # of the network
    rounded_loss: Bounded  # loss of the weights rounded to ``dtype``, and so on
    rounded_gap: Bounded | None
    rounded_head_gap: Bounded | None
    method: str
    iterations: int
    seconds: float
    distance: float  # |W - W_0|_F

    def layer(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias) in ``dtype``, to which ``rounded_gap`` refers."""
        return self.weight.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)


def gap_between(loss: Bounded, infimum: Bounded | None) -> Bounded | None:
    """Compute loss - infimum with bounds, which are never below 0.

    Args:
        loss: mean loss of a head, with its bounds.
        infimum: infimum of the loss over all outputs; None: not known.
    """
    if infimum is None:
        return None
    upper = math.nextafter(loss.upper - infimum.lower, math.inf)
    lower = max(math.nextafter(loss.lower - infimum.upper, -math.inf), 0.0)
    value = min(max(loss.value - infimum.value, lower), upper)
    return Bounded(
        value, lower, upper, loss.certified and infimum.certified, f"loss in {loss.method}; infimum: {infimum.method}"
    )


def gap_to_heads(loss: Bounded, infimum: Bounded | None, dual: DualBound | None) -> Bounded | None:
    """Bound the loss minus its infimum over heads: between 0 and the difference to the better known lower bound.

    Args:
        loss: mean loss of a head, with its bounds.
        infimum: infimum of the loss over all outputs; None: not known.
        dual: a lower bound over heads; None: not known.
    """
    known = [(infimum.lower, infimum.certified, "infimum over all outputs")] if infimum is not None else []
    if dual is not None:
        where = "all heads" if math.isinf(dual.radius) else f"heads with |W|_F <= {dual.radius:.3g}"
        known.append((dual.lower, True, f"Fenchel dual bound over {where}"))
    if not known:
        return None
    lower, certified, method = max(known)
    upper = max(math.nextafter(loss.upper - lower, math.inf), 0.0)
    return Bounded(upper, 0.0, upper, loss.certified and certified, method)


@dataclass(frozen=True)
class Judgement:
    """Proven bounds of the loss and the gaps of one W, and of its rounding to the network's type."""

    loss: Bounded
    gap: Bounded | None
    head_gap: Bounded | None
    rounded_loss: Bounded
    rounded_gap: Bounded | None
    rounded_head_gap: Bounded | None

    def best(self) -> float:
        """Return the smaller upper bound of the two gaps after rounding; infinite if none is known."""
        return min((g.upper for g in (self.rounded_gap, self.rounded_head_gap) if g is not None), default=math.inf)


def judge(problem: HeadProblem, w: Tensor, dual: DualBound | None, dtype: torch.dtype) -> Judgement:
    """Bound the loss and the gaps of W, and of W rounded to ``dtype``, with one pass each.

    Args:
        problem: the problem of the head.
        w: last layer W, (D, C).
        dual: lower bound over heads; None: not known.
        dtype: floating type of the network.
    """
    loss, rounded = problem.value(w), problem.value(w.to(dtype).double())
    if dual is not None and float(w.norm()) > dual.radius:
        dual = None
    return Judgement(
        loss,
        gap_between(loss, problem.infimum),
        gap_to_heads(loss, problem.infimum, dual),
        rounded,
        gap_between(rounded, problem.infimum),
        gap_to_heads(rounded, problem.infimum, dual),
    )
