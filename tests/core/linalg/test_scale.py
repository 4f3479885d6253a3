"""Ends of intervals are rounded outwards, in subnormals and at the edge of overflow too; eigenvalues are bounded at every scale."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_conv import kernel_spectrum, largest_eigenvalue, ntk_gram, ritz_bounds, smallest_eigenvalue
from lightning_conv.linalg.eigenvalues.bounded import SAYS_NOTHING, Bounded, quotient
from lightning_conv.linalg.rounding import (
    FEW,
    exponent_of,
    frobenius,
    ldexp_down,
    ldexp_up,
    product_down,
    product_up,
    quotient_down,
    quotient_up,
    require_moderate,
    root_down,
    root_up,
    sum_down,
    sum_up,
)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
SCALES = [-1070, -1040, -1000, -600, -300, -201, 0, 201, 600, 1000, 1015]


def is_nearest_below(found: float, exact: Fraction) -> bool:
    """Whether ``found`` is the largest float64 up to ``exact``, -inf and the largest number included."""
    after = math.nextafter(found, math.inf)
    below = found == -math.inf or Fraction(found) <= exact
    return below and (after == math.inf or Fraction(after) > exact)


def check(down: float, up: float, exact: Fraction) -> None:
    assert is_nearest_below(down, exact)
    assert is_nearest_below(-up, -exact)
    assert math.copysign(1, down) == math.copysign(1, up) or down < 0 or exact == 0


@settings(max_examples=500, deadline=None)
@given(a=NUMBERS, b=NUMBERS, c=POSITIVE, exponent=st.integers(-2200, 2200))
@example(a=sys.float_info.max, b=sys.float_info.max, c=5e-324, exponent=2000)
@example(a=5e-324, b=-5e-324, c=sys.float_info.max, exponent=-2000)
@example(a=0.0, b=0.0, c=1.0, exponent=0)
def test_directed_operations_return_the_nearest_number_on_their_side(a, b, c, exponent):
    x, y, z = Fraction(a), Fraction(b), Fraction(c)
    check(sum_down(a, b, c), sum_up(a, b, c), x + y + z)
    check(quotient_down(a, c), quotient_up(a, c), x / z)
    check(product_down(a, b, c), product_up(a, b, c), x * y * z)
    check(ldexp_down(a, exponent), ldexp_up(a, exponent), x * Fraction(2) ** exponent)
    low, high = root_down(c), root_up(c)
    assert Fraction(low) ** 2 <= z <= Fraction(high) ** 2
    assert high <= math.nextafter(low, math.inf)


def test_the_factor_for_a_few_operations_covers_thirty_of_them():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        factors = (0.5 + torch.rand(31, generator=generator, dtype=torch.float64)).tolist()
        value, exact = 1.0, Fraction(1)
        for index, factor in enumerate(factors):
            value = value * factor if index % 2 else value / factor
            exact = exact * Fraction(factor) if index % 2 else exact / Fraction(factor)
        assert Fraction(value) / Fraction(FEW) <= exact <= Fraction(value) * Fraction(FEW)


@settings(max_examples=500, deadline=None)
@given(
    ends=st.tuples(NUMBERS, NUMBERS),
    other=st.tuples(POSITIVE, POSITIVE),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_quotient_of_intervals_contains_every_quotient(ends, other, at):
    top, bottom = sorted(ends), sorted(other)
    found = quotient(*(Bounded(e[0], *e, certified=True, method="") for e in (top, bottom)))
    for share_top in (0, 1, at[0]):
        for share_bottom in (0, 1, at[1]):
            x, y = (
                Fraction(e[0]) + (Fraction(e[1]) - Fraction(e[0])) * Fraction(s)
                for e, s in ((top, share_top), (bottom, share_bottom))
            )
            assert found.lower == -math.inf or Fraction(found.lower) <= x / y
            assert found.upper == math.inf or x / y <= Fraction(found.upper)


@pytest.mark.parametrize("ends", [(-math.inf, math.inf), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)])
def test_an_interval_that_says_nothing_is_not_certified(ends):
    found = Bounded(1.0, *ends, certified=True, method="m")
    assert not found.certified
    assert found.reason == SAYS_NOTHING
    assert Bounded(1.0, *ends, certified=True, method="m", reason="r").reason == f"r; {SAYS_NOTHING}"
    assert Bounded(1.0, *ends, certified=False, method="m").reason == ""


@pytest.mark.parametrize(
    "ends", [(1.0, math.inf), (-math.inf, 3.0), (-2.0, math.inf), (-math.inf, -math.inf), (0.0, 0.0)]
)
def test_an_interval_that_says_something_stays_certified(ends):
    assert Bounded(1.0, *ends, certified=True, method="m").certified


def test_an_unbounded_quotient_is_not_certified():
    one, about_zero = (Bounded(1.0, low, 1.0, certified=True, method="m") for low in (1.0, -1.0))
    assert not quotient(Bounded(0.0, 0.0, 1.0, certified=True, method="m"), about_zero).certified
    assert quotient(one, about_zero).certified  # at least 1


def exact_ends(matrix):
    with mpmath.workdps(60):
        values = mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True)
    return values[0], values[len(values) - 1], list(values)


@pytest.mark.parametrize("exponent", SCALES)
@pytest.mark.parametrize("method", [None, "extremes"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_kernel_spectra_contain_the_exact_eigenvalues_at_every_scale(exponent, method, size):
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(size, size + seed % 3, generator=generator, dtype=torch.float64)
        half = exponent // 2
        matrix = factor @ factor.T * 2.0**half * 2.0 ** (exponent - half)
        low, high, every = exact_ends(matrix)
        found = kernel_spectrum(matrix, method=method)
        assert found.lambda_min.certified
        assert found.lambda_max.certified
        assert found.lambda_min.lower <= low <= found.lambda_min.upper
        assert found.lambda_max.lower <= high <= found.lambda_max.upper
        if found.radius is not None:
            with mpmath.workdps(60):
                radius = mpmath.mpf(found.radius)
                assert all(
                    abs(mpmath.mpf(v) - e) <= radius for v, e in zip(found.eigenvalues.tolist(), every, strict=True)
                )
            if exponent > -1000:
                assert found.radius <= 1e-13 * float(high) * size
                assert found.lambda_max.upper - found.lambda_max.lower <= 1e-12 * float(high)


def test_the_extreme_scale_costs_no_digit():
    torch.manual_seed(0)
    factor = torch.randn(6, 6, dtype=torch.float64)
    plain = kernel_spectrum(factor @ factor.T)
    for exponent in (-700, 700):
        scaled = kernel_spectrum(factor @ factor.T * 2.0**exponent)
        for end in ("lambda_min", "lambda_max"):
            one, other = getattr(plain, end), getattr(scaled, end)
            width = (one.upper - one.lower) * 2.0**exponent
            assert other.upper - other.lower == pytest.approx(width, rel=0.5)


def test_an_eigenvalue_that_overflows_is_refused_with_a_sentence():
    matrix = torch.full((4, 4), 1.5e308, dtype=torch.float64)
    for method in (None, "extremes"):
        with pytest.raises(ValueError, match=r"gram: entries of up to 2\^1024, so an eigenvalue overflows; divide"):
            kernel_spectrum(matrix, method=method)


@pytest.mark.parametrize("exponent", [-1040, -600, 600, 990])
def test_ritz_values_of_an_operator_are_those_of_the_scaled_one(exponent):
    diagonal = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None]
    half = exponent // 2
    found = ritz_bounds(lambda v: diagonal * v * 2.0**half * 2.0 ** (exponent - half), 8, steps=8)
    assert found.lambda_min.lower <= math.ldexp(1.0, exponent) <= found.lambda_min.upper
    assert found.lambda_max.lower <= math.ldexp(8.0, exponent) <= found.lambda_max.upper
    assert found.lambda_min.value == pytest.approx(math.ldexp(1.0, exponent), rel=1e-6)


def test_zero_stays_exact():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    for found in (kernel_spectrum(zero).lambda_min, largest_eigenvalue(zero), smallest_eigenvalue(zero)):
        assert (found.lower, found.value, found.upper) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("size", [1e-150, 1e-160, 1e-170])
def test_a_kernel_whose_products_vanish_is_not_certified_as_zero(size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[2].weight.mul_(size)
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    inputs = torch.randn(3, 3, dtype=torch.float64)
    found = kernel_spectrum(ntk_gram(model, inputs, precision="certified")).lambda_max
    rows = []
    for x in inputs:
        row = torch.autograd.grad(model(x[None]).sum(), list(model[0].parameters()))
        rows.append(torch.cat([part.flatten() for part in row]).tolist())
    with mpmath.workdps(60):
        jacobian = mpmath.matrix(rows)
        exact = mpmath.eigsy(jacobian * jacobian.T, eigvals_only=True)[2]
        assert exact > 0
        assert found.lower <= exact <= found.upper


@settings(max_examples=100, deadline=None)
@given(exponent=st.integers(-1060, 1000), seed=st.integers(0, 99))
def test_a_norm_neither_vanishes_nor_overflows(exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    half = exponent // 2
    values = values * 2.0**half * 2.0 ** (exponent - half)
    with mpmath.workdps(60):
        exact = mpmath.sqrt(mpmath.fsum(mpmath.mpf(v) ** 2 for v in values.tolist()))
        assert abs(mpmath.mpf(frobenius(values)) - exact) <= exact * mpmath.mpf(2) ** -49 + mpmath.mpf(2) ** -1073


def test_sizes_that_no_product_survives_are_named():
    require_moderate(torch.zeros(2), "x")
    require_moderate(torch.tensor([1e-60, 1e60], dtype=torch.float64), "x")
    assert exponent_of(torch.tensor([0.5, 3.0])) == 2
    with pytest.raises(ValueError, match=r"x: of size up to 1.0e\+160, whose products overflow; divide by a constant"):
        require_moderate(torch.tensor([1e160], dtype=torch.float64), "x")
    with pytest.raises(ValueError, match=r"x: of size up to 1.0e-160, whose products vanish; multiply by a constant"):
        require_moderate(torch.tensor([1e-160], dtype=torch.float64), "x")
