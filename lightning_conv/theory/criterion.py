"""``Criterion``: one testable inequality of a theorem, the measured number and the verdict that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.linalg.eigenvalues.bounded import Bounded

Verdict: TypeAlias = Literal["certified", "consistent", "refuted", "undecided", "not applicable"]


@dataclass(frozen=True)
class Criterion:
    """One inequality that a theorem requires.

    The verdicts are

    - ``certified``: the inequality is proven, rounding included;
    - ``consistent``: the inequality is true where it was measured, which proves nothing beyond these measurements;
    - ``refuted``: the inequality is measured, or proven, to be false;
    - ``undecided``: the bound lies within the error of the measurement;
    - ``not applicable``: a hypothesis of the theorem is violated in this run.

    No verdict means that a theorem is satisfied, because the O(.) constants of the theorems are unspecified.
    """

    name: str  # short, lower case, as in a tag: "lambda_min_ratio"
    source: str  # paper and theorem
    asks: str  # the inequality, in words and symbols
    measured: float  # NaN: not measured
    bound: float  # the number that ``measured`` is compared with; NaN: there is none
    verdict: Verdict
    reason: str


def at_least(
    name: str, source: str, asks: str, measured: Bounded | float, bound: float, *, proves: bool = False
) -> Criterion:
    """Judge the inequality measured >= bound.

    Args:
        name: See ``Criterion``.
        source: See ``Criterion``.
        asks: See ``Criterion``.
        measured: The measured number, with its error where that is known.
        bound: The least value that satisfies the inequality.
        proves: Whether a true inequality proves what is asked, and is not only one observation of it. The verdict is
            ``certified`` only if ``measured`` is a certified ``Bounded`` as well.
    """
    return _judge(name, source, asks, measured, bound, proves, above=True)


def at_most(
    name: str, source: str, asks: str, measured: Bounded | float, bound: float, *, proves: bool = False
) -> Criterion:
    """Judge the inequality measured <= bound; the arguments are those of ``at_least``."""
    return _judge(name, source, asks, measured, bound, proves, above=False)


def not_applicable(name: str, source: str, asks: str, reason: str, measured: float = math.nan) -> Criterion:
    """Return a criterion whose theorem does not cover the run; the measured number may still be given."""
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
        reason = (
            f"{value:.4g} lies between {lower:.4g} and {upper:.4g}, an interval that contains the bound {bound:.4g}"
        )
    return Criterion(name, source, asks, value, bound, verdict, reason)
