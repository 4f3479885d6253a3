"""Products and their error bounds against exact rational arithmetic."""

from fractions import Fraction

import mpmath
import pytest
import torch

from lightning_conv.kernels.products.precision import PRECISIONS, product, product_gamma
from lightning_conv.linalg.rounding import gamma, unit_roundoff


def exact_product(x, y):
    rows, columns = ([[Fraction(v) for v in row] for row in matrix.tolist()] for matrix in (x, y))
    return [[sum(a * b for a, b in zip(r, c, strict=True)) for c in columns] for r in rows]


def errors(x, y, precision):
    """|computed - exact| / (|x_i||y_j|) of every entry."""
    computed, exact = product(x, y, precision).tolist(), exact_product(x, y)
    norms = [[mpmath.sqrt(mpmath.fsum(mpmath.mpf(v) ** 2 for v in r)) for r in m.tolist()] for m in (x, y)]
    return [
        float(
            mpmath.mpf(abs(Fraction(computed[i][j]) - exact[i][j]).numerator)
            / abs(Fraction(computed[i][j]) - exact[i][j]).denominator
            / (norms[0][i] * norms[1][j])
        )
        for i in range(len(x))
        for j in range(len(y))
    ]


def test_unit_roundoff_is_half_the_distance_to_the_next_number():
    assert unit_roundoff(torch.float32) == 2.0**-24
    assert unit_roundoff(torch.float64) == 2.0**-53


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [1, 7, 256, 100_000])
def test_gamma_is_ku_over_one_minus_ku(terms, dtype):
    ku = Fraction(terms) * Fraction(1, 2 ** (24 if dtype == torch.float32 else 53))
    assert gamma(terms, dtype) == pytest.approx(float(ku / (1 - ku)), rel=1e-14)


def test_gamma_is_infinite_where_the_theory_ends():
    assert gamma(2**24, torch.float32) == float("inf")
    assert gamma(2**24 - 1, torch.float32) < float("inf")


@pytest.mark.parametrize("kind", ["normal", "constant", "spread", "cancelling"])
@pytest.mark.parametrize("terms", [1, 2, 3, 511, 512, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_product_errs_by_at_most_its_bound(precision, dtype, terms, kind):
    x, y = torch.randn(2, 2, terms, dtype=torch.float64)
    if kind == "constant":  # all roundings go the same way
        x, y = torch.full_like(x, 1 / 3), torch.full_like(y, 0.7)
    elif kind == "spread":
        x, y = x * torch.logspace(-8, 8, terms, dtype=torch.float64), y * torch.logspace(8, -8, terms).double()
    elif kind == "cancelling":
        x[:, -1], y[:, -1] = 1.5, 0.7  # with a single term nothing cancels
        y = y - x * (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
    x, y = x.to(dtype), y.to(dtype)
    assert max(errors(x, y, precision)) <= product_gamma(terms, dtype, precision)


def test_bound_of_a_single_float32_product_is_reached():
    x, y = torch.rand(2, 20, 1) + 1
    assert 0.5 * product_gamma(1, torch.float32, "fast") < max(errors(x, y, "fast"))


def test_exact_products_of_float32_factors_are_far_more_accurate_than_float32():
    x, y = torch.randn(2, 3, 600)
    assert max(errors(x, y, "exact")) < 1e-15 < 1e-9 < max(errors(x, y, "fast"))


def test_long_sums_lose_nothing_to_length_in_fast():
    # One float32 sum over 2^18 equal terms drifts by hundreds of units; blocks of 512 summed in float64 do not.
    x = torch.full((1, 2**18), 0.1)
    exact = Fraction(float(x[0, 0])) ** 2 * 2**18
    assert abs(Fraction(float(product(x, x, "fast"))) - exact) / exact <= Fraction(1, 2**16)
    assert product_gamma(2**18, torch.float32, "fast") < 2**-14.9
