"""``Criterion``: one testable inequality of a theorem, what was measured, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.linalg.eigenvalues.bounded import Bounded

Verdict: TypeAlias = Literal["certified", "consistent", "refuted", "undecided", "not applicable"]


@dataclass(frozen=True)
class Criterion:
    """One inequality that a theorem asks for.

    ``certified``: proven, rounding included. ``consistent``: measured to hold where it was measured, which proves nothing beyond.
    ``refuted``: measured, or proven, not to hold. ``undecided``: the error of the measurement covers the bound.
    ``not applicable``: a hypothesis of the theorem does not hold in this run. None of them says that a theorem is
    satisfied: their O(.) constants are unspecified.
    """

    name: str  # short, lower case, as in a tag: "lambda_min_ratio"
    source: str  # paper and theorem
    asks: str  # the inequality, in words and symbols
    measured: float  # NaN: not measured
    bound: float  # that the measured number is held against; NaN: there is none
    verdict: Verdict
    reason: str


def at_least(
    name: str, source: str, asks: str, measured: Bounded | float, bound: float, *, proves: bool = False
) -> Criterion:
    """The criterion measured >= bound.

    Args:
        name: see ``Criterion``.
        source: see ``Criterion``.
        asks: see ``Criterion``.
        measured: the number, with its error where that is known.
        bound: that it must reach.
        proves: whether holding here is a proof of what is asked, not one observation of it. Needs a certified ``Bounded``.
    """
    return _judge(name, source, asks, measured, bound, proves, above=True)


def at_most(
    name: str, source: str, asks: str, measured: Bounded | float, bound: float, *, proves: bool = False
) -> Criterion:
    """The criterion measured <= bound; arguments as in ``at_least``."""
    return _judge(name, source, asks, measured, bound, proves, above=False)


def not_applicable(name: str, source: str, asks: str, reason: str, measured: float = math.nan) -> Criterion:
    """A criterion whose theorem does not cover the run; the raw number may still be told."""
    return Criterion(name, source, asks, measured, math.nan, "not applicable", reason)


def _judge(
    name: str, source: str, asks: str, measured: Bounded | float, bound: float, proves: bool, above: bool
) -> Criterion:
    value, lower, upper, certified = (
        (measured.value, measured.lower, measured.upper, measured.certified)
        if isinstance(measured, Bounded)
        else (measured, measured, measured, False)
    )
    sign, relation = ("<", "at least") if above else (">", "at most")
    verdict: Verdict
    if math.isnan(value) or math.isnan(bound):
        verdict, reason = "undecided", "the measurement gave no number"
    elif (lower >= bound) if above else (upper <= bound):
        proven = proves and certified
        verdict = "certified" if proven else "consistent"
        reason = f"{value:.4g} is {relation} {bound:.4g}" + ("" if proven else " where it was measured")
    elif (upper < bound) if above else (lower > bound):
        verdict, reason = "refuted", f"{value:.4g} {sign} {bound:.4g}"
    else:
        verdict = "undecided"
        reason = f"{value:.4g} lies between {lower:.4g} and {upper:.4g}, which holds the bound {bound:.4g}"
    return Criterion(name, source, asks, value, bound, verdict, reason)
