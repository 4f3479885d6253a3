"""Trace, Frobenius norm and alignment from products, against the dense matrix."""

import math

import pytest
import torch

from lightning_conv.linalg.estimates import (
    estimate_alignment,
    estimate_frobenius_norm,
    estimate_target_alignment,
    estimate_trace,
)

SIZE, SEEDS = 60, 300
DECAYING = 1.0 / torch.arange(1, SIZE + 1, dtype=torch.float64)
FLAT = torch.linspace(1, 2, SIZE, dtype=torch.float64)
INDEFINITE = torch.linspace(-1, 2, SIZE, dtype=torch.float64)
SPECTRA = {"decaying": DECAYING, "flat": FLAT, "indefinite": INDEFINITE}


def counted(matrix):
    """The matrix as an operator, and how many vectors it was given."""
    seen = []

    def matvec(vectors):
        assert vectors.ndim == 2
        seen.append(vectors.shape[1])
        return matrix @ vectors

    return matvec, seen


def trace(matrix, **options):
    return estimate_trace(counted(matrix)[0], len(matrix), **options)


def square(matrix, **options):
    """The unbiased one behind the norm, with the standard error that belongs to it."""
    norm = estimate_frobenius_norm(counted(matrix)[0], len(matrix), **options)
    return norm.value**2, 2 * norm.value * norm.standard_error


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_trace_is_unbiased_and_its_standard_error_covers(spectrum, with_spectrum):
    matrix = with_spectrum(SPECTRA[spectrum])
    truth = float(matrix.trace())
    found = [trace(matrix, products=30, seed=seed) for seed in range(SEEDS)]
    check_sample([(e.value, e.standard_error) for e in found], truth)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_squared_norm_is_unbiased_and_its_standard_error_covers(spectrum, with_spectrum):
    matrix = with_spectrum(SPECTRA[spectrum])
    found = [square(matrix, products=30, seed=seed) for seed in range(SEEDS)]
    check_sample(found, float(matrix.norm() ** 2))


def check_sample(pairs, truth):
    """Mean within 4 of its own standard errors, and about 68 % and 95 % of the values within 1 and 2 stated ones."""
    values, errors = torch.tensor(pairs, dtype=torch.float64).T
    assert abs(float(values.mean()) - truth) <= 4 * float(values.std()) / math.sqrt(len(values))
    distance = (values - truth).abs() / errors
    # Ten samples: Student's t with 9 degrees of freedom gives 66 % and 92 %; 300 seeds err by up to 3 and 2 % more.
    assert 0.57 <= float((distance <= 1).double().mean()) <= 0.76
    assert 0.86 <= float((distance <= 2).double().mean()) <= 0.98
    # Neither too large: the stated error is that of the values.
    assert 0.8 <= float(errors.square().mean().sqrt() / values.std()) <= 1.25


def test_deflation_beats_plain_signs_where_the_spectrum_decays(with_spectrum):
    matrix = with_spectrum(DECAYING**2)
    plain = math.sqrt(2 * float((matrix - matrix.diag().diag()).square().sum()) / 30)  # Hutchinson with 30 products
    assert trace(matrix, products=30).standard_error < plain / 10


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_low_rank_is_exact(rank, with_spectrum):
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:rank] = torch.linspace(1, 3, rank, dtype=torch.float64)
    matrix, other = with_spectrum(values), with_spectrum(values.square(), seed=3)
    for seed in range(5):
        found = trace(matrix, products=30, seed=seed)
        assert found.value == pytest.approx(float(values.sum()), rel=1e-12)
        assert found.standard_error <= 1e-12
        norm = estimate_frobenius_norm(counted(matrix)[0], SIZE, products=30, seed=seed)
        assert norm.value == pytest.approx(float(values.norm()), rel=1e-12)
        aligned = estimate_alignment(counted(matrix)[0], counted(other)[0], SIZE, products=40, seed=seed)
        assert aligned.value == pytest.approx(float((matrix * other).sum() / (matrix.norm() * other.norm())), abs=1e-12)


def test_products_with_the_identity_where_they_suffice(with_spectrum):
    matrix = with_spectrum(FLAT)
    for function, truth in ((estimate_trace, matrix.trace()), (estimate_frobenius_norm, matrix.norm())):
        matvec, seen = counted(matrix)
        found = function(matvec, SIZE, products=SIZE)
        assert found.value == pytest.approx(float(truth), rel=1e-13)
        assert (found.standard_error, found.samples, found.method) == (0.0, SIZE, "products with the identity")
        assert sum(seen) == SIZE


@pytest.mark.parametrize("products", [6, 7, 8, 30, 31, 59])
def test_no_more_products_than_asked_and_all_are_told(products, with_spectrum):
    matrix = with_spectrum(FLAT)
    for function in (estimate_trace, estimate_frobenius_norm):
        matvec, seen = counted(matrix)
        found = function(matvec, SIZE, products=products)
        assert sum(seen) == found.samples == products


def test_the_seed_decides():
    matrix = torch.diag(FLAT) + 0.1
    first, same, other = (trace(matrix, seed=seed).value for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("products", [5, 0, -1])
def test_too_few_products_are_refused(products):
    for function in (estimate_trace, estimate_frobenius_norm):
        with pytest.raises(ValueError, match=f"products: {products}; need at least 6"):
            function(lambda v: v, 20, products=products)
    with pytest.raises(ValueError, match="products: 7; need at least 8"):
        estimate_alignment(lambda v: v, lambda v: v, 20, products=7)


# --- alignment ------------------------------------------------------------------------------------------------------


def test_alignment_of_two_operators_covers_the_truth(with_spectrum):
    left, right = with_spectrum(DECAYING.sqrt()), with_spectrum(FLAT, seed=1)
    right = left + 0.3 * right
    truth = float((left * right).sum() / (left.norm() * right.norm()))
    found = [estimate_alignment(counted(left)[0], counted(right)[0], SIZE, products=40, seed=s) for s in range(SEEDS)]
    check_sample([(e.value, e.standard_error) for e in found], truth)
    assert found[0].samples == 80


def test_alignment_of_multiples_is_one_without_error(with_spectrum):
    matrix = with_spectrum(DECAYING)
    for factor in (0.01, 3.0):
        found = estimate_alignment(counted(matrix)[0], counted(factor * matrix)[0], SIZE, products=20)
        assert found.value == pytest.approx(1, abs=1e-12)
        assert found.standard_error <= 1e-12
    assert estimate_alignment(counted(matrix)[0], counted(-matrix)[0], SIZE).value == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize("columns", [1, 3])
def test_target_alignment_covers_the_truth(columns, with_spectrum):
    matrix = with_spectrum(DECAYING.sqrt())
    targets = torch.randn(SIZE, columns, dtype=torch.float64)
    outer = targets @ targets.T
    truth = float((matrix * outer).sum() / (matrix.norm() * outer.norm()))
    found = [estimate_target_alignment(counted(matrix)[0], SIZE, targets, products=30, seed=s) for s in range(SEEDS)]
    inside = [abs(e.value - truth) <= 2 * e.standard_error for e in found]
    assert sum(inside) >= 0.86 * SEEDS
    assert found[0].samples == 30 + columns
    assert sum(e.value for e in found) / SEEDS == pytest.approx(truth, rel=4e-3)


def test_alignment_with_nothing_is_not_a_number():
    zero = torch.zeros(20, 20, dtype=torch.float64)
    one = torch.eye(20, dtype=torch.float64)
    assert math.isnan(estimate_alignment(lambda v: zero @ v, lambda v: v, 20).value)
    assert math.isnan(estimate_target_alignment(lambda v: zero @ v, 20, one[:, :1]).value)
    assert math.isnan(estimate_target_alignment(lambda v: v, 20, zero[:, :1]).value)
    assert estimate_frobenius_norm(lambda v: zero @ v, 20, products=9).value == 0


def test_targets_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets: shape \(7, 1\); need \(20, k\)"):
        estimate_target_alignment(lambda v: v, 20, torch.ones(7, 1, dtype=torch.float64))
