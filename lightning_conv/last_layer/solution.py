"""``HeadSolution``: a last layer with what is proven about its loss, as solved and as the network will hold it."""

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
    """A last layer, and how far its mean loss is from the infimum over all outputs and from that over all heads."""

    verdict: SolutionVerdict  # of the claim: one of the two gaps, after rounding to ``dtype``, is at most ``tol``
    reason: str
    weight: Tensor  # (C, m_H), float64
    bias: Tensor | None  # (C,), float64
    loss: Bounded
    infimum: Bounded | None  # (1/n) sum_i inf ell_i, of all outputs; None: not known
    gap: Bounded | None  # loss - infimum: an upper bound of what any network could gain
    head_infimum: DualBound | None  # a lower bound of the loss over all heads on these features; None: only ``infimum``
    head_gap: Bounded | None  # loss - inf over heads: between 0 and what the better of the two lower bounds leaves
    dtype: torch.dtype  # of the network
    rounded_loss: Bounded  # the same of the weights rounded to ``dtype``
    rounded_gap: Bounded | None
    rounded_head_gap: Bounded | None
    method: str
    iterations: int
    seconds: float
    distance: float  # |W - W_0|_F

    def layer(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) in ``dtype``: what ``rounded_gap`` is about."""
        return self.weight.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)


def gap_between(loss: Bounded, infimum: Bounded | None) -> Bounded | None:
    """Loss - infimum, never below 0.

    Args:
        loss: of a head.
        infimum: of the loss over all outputs; None: not known.
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
    """Loss - inf over heads, of which a lower bound is known: 0 at least, the smaller of two differences at most.

    Args:
        loss: of a head.
        infimum: of the loss over all outputs.
        dual: a lower bound over heads.
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
    """What is proven about one W and its rounding."""

    loss: Bounded
    gap: Bounded | None
    head_gap: Bounded | None
    rounded_loss: Bounded
    rounded_gap: Bounded | None
    rounded_head_gap: Bounded | None

    def best(self) -> float:
        """The smaller upper bound of the two gaps after rounding; infinite where none is known."""
        return min((g.upper for g in (self.rounded_gap, self.rounded_head_gap) if g is not None), default=math.inf)


def judge(problem: HeadProblem, w: Tensor, dual: DualBound | None, dtype: torch.dtype) -> Judgement:
    """Two passes: one for W, one for what is left of it in ``dtype``.

    Args:
        problem: the head's.
        w: W.
        dual: lower bound over heads.
        dtype: of the network.
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
