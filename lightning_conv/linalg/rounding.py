"""The unit roundoff, the constants of rounding error bounds, and results that are rounded in a chosen direction.

A sum of k products, in any order, errs by at most gamma_k |x||y| with gamma_k = k u / (1 - k u), where the unit
roundoff u is 2^-24 in float32 and 2^-53 in float64 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
Lemma 3.1, (3.5)). Ends of intervals are few numbers, so they are computed in exact rational arithmetic and rounded once,
outwards; this includes results that are subnormal or overflow.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import torch
from torch import Tensor

MODERATE = 200
"""Exponent up to which products of two numbers and sums of these are far from the ends of the range of float64."""
LARGEST = sys.float_info.max
FEW = 1 + 2.0**-48
"""Factor that covers the rounding of up to 31 multiplications, divisions, roots and sums of numbers of one sign."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u of a floating type: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return gamma_k = k u / (1 - k u) for k = ``terms``, Higham (3.1); infinity where k u is 1 or more."""
    ku = terms * unit_roundoff(dtype)
    return ku / (1 - ku) if ku < 1 else float("inf")


def rounded_down(exact: Fraction) -> float:
    """Return the largest float64 that is at most ``exact``, -inf below all of them.

    Example:
        >>> rounded_down(Fraction(1, 3)) < Fraction(1, 3) <= rounded_up(Fraction(1, 3))
        True
    """
    try:
        nearest = exact.numerator / exact.denominator  # correctly rounded, in contrast to a product of quotients
    except OverflowError:
        return LARGEST if exact > 0 else -math.inf
    return nearest if Fraction(nearest) <= exact else math.nextafter(nearest, -math.inf)


def rounded_up(exact: Fraction) -> float:
    """Return the smallest float64 that is at least ``exact``, inf above all of them."""
    return 0.0 - rounded_down(-exact)


def sum_down(*terms: float) -> float:
    """Return the largest float64 that is at most the exact sum; infinite terms add up as in floating point."""
    if not all(math.isfinite(term) for term in terms):
        return sum(terms)
    return rounded_down(sum(map(Fraction, terms), start=Fraction(0)))


def sum_up(*terms: float) -> float:
    """Return the smallest float64 that is at least the exact sum; infinite terms add up as in floating point."""
    return 0.0 - sum_down(*(-term for term in terms))


def quotient_down(numerator: float, denominator: float) -> float:
    """Return the largest float64 that is at most numerator / denominator, for a positive denominator.

    If one of the two is infinite or NaN, the result is that of floating point.
    """
    if not (math.isfinite(numerator) and math.isfinite(denominator)):
        return numerator / denominator
    return rounded_down(Fraction(numerator) / Fraction(denominator))


def quotient_up(numerator: float, denominator: float) -> float:
    """Return the smallest float64 that is at least numerator / denominator, for a positive denominator."""
    return 0.0 - quotient_down(-numerator, denominator)


def product_down(*factors: float) -> float:
    """Return the largest float64 that is at most the exact product; infinite factors multiply as in floating point."""
    if not all(math.isfinite(factor) for factor in factors):
        return math.prod(factors)
    return rounded_down(math.prod(map(Fraction, factors), start=Fraction(1)))


def product_up(first: float, *others: float) -> float:
    """Return the smallest float64 that is at least the exact product; infinite factors multiply as in floating point."""
    return 0.0 - product_down(-first, *others)


def root_down(square: float) -> float:
    """Return the largest float64 that is at most the square root of a number that is not negative."""
    root = math.sqrt(square)
    return root if math.isinf(root) or Fraction(root) ** 2 <= Fraction(square) else math.nextafter(root, 0.0)


def root_up(square: float) -> float:
    """Return the smallest float64 that is at least the square root of a number that is not negative."""
    root = math.sqrt(square)
    return root if math.isinf(root) or Fraction(root) ** 2 >= Fraction(square) else math.nextafter(root, math.inf)


def float32_down(number: float) -> float:
    """Return the largest number of float32 that is at most ``number``: what loggers keep of a lower bound.

    Example:
        >>> float32_down(0.1) <= 0.1 < float32_down(0.1) * (1 + 2**-22)
        True
    """
    nearest = torch.tensor(number, dtype=torch.float32)
    below = torch.nextafter(nearest, torch.tensor(-math.inf))
    return float(below if float(nearest) > number else nearest)


def ldexp_down(number: float, exponent: int) -> float:
    """Return the largest float64 that is at most 2^exponent times the number."""
    if not math.isfinite(number):
        return number
    if exponent >= 0:
        return rounded_down(Fraction(number) * 2**exponent)
    return rounded_down(Fraction(number) / 2**-exponent)


def ldexp_up(number: float, exponent: int) -> float:
    """Return the smallest float64 that is at least 2^exponent times the number."""
    return 0.0 - ldexp_down(-number, exponent)


def ldexp(values: Tensor, exponent: int) -> Tensor:
    """Compute 2^exponent times the values, in two steps, because 2^1074 overflows; exact unless the result is subnormal."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def exponent_of(values: Tensor) -> int:
    """Return k with 2^(k-1) <= max |values| < 2^k, so that 2^-k times the values is below 1; 0 if all are zero."""
    return math.frexp(float(values.abs().max()))[1] if values.numel() else 0


def require_moderate(values: Tensor, name: str) -> None:
    """Refuse numbers whose squares or products vanish or overflow: the largest must be within 2^-200 ... 2^200, or 0.

    Args:
        values: finite numbers.
        name: the argument that they stand for, as the message calls it.

    Raises:
        ValueError: the largest is outside that range.
    """
    exponent = exponent_of(values)
    if abs(exponent) > MODERATE:
        what, cure = ("overflow", "divide") if exponent > 0 else ("vanish", "multiply")
        raise ValueError(
            f"{name}: of size up to {float(values.abs().max()):.1e}, whose products {what}; {cure} by a constant"
        )


def frobenius(values: Tensor) -> float:
    """Compute the Euclidean norm of all entries without squares that vanish or overflow, rounded up to the next number.

    Its relative error is gamma_{k+3} for k entries, as that of a plain norm; it is 0 only if all entries are.
    """
    exponent = exponent_of(values)
    return ldexp_up(float(torch.linalg.vector_norm(ldexp(values, -exponent))), exponent)
