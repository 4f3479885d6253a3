"""What a Cholesky factorisation that succeeds in floating point proves: never more than is true."""

import math

import numpy as np
import pytest
import torch

from lightning_conv.linalg.eigenvalues.cholesky import rounding_level, shifted_cholesky
from lightning_conv.linalg.eigenvalues.symmetric import symmetric_matrix


@pytest.mark.parametrize("a_posteriori", [False, True])
@pytest.mark.parametrize("power", [7, 20, 33, 40])
@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_lower_bound_is_below_the_exact_eigenvalue_and_close_to_the_shift(size, power, a_posteriori, dyadic):
    matrix, exact = dyadic(size, power)
    a = symmetric_matrix(matrix)
    level = rounding_level(a)
    for share in (0.5, 0.9, 1 - 1e-3, 1 - 1e-9):
        factor = shifted_cholesky(a, share * exact[0], a_posteriori=a_posteriori)
        if factor is not None:
            assert factor.lower <= exact[0]
            assert factor.shift - factor.lower <= (4 if a_posteriori else 1.01) * level
    assert shifted_cholesky(a, exact[0] - 2 * level, a_posteriori=a_posteriori) is not None
    assert shifted_cholesky(a, exact[0] + 2 * level, a_posteriori=a_posteriori) is None


@pytest.mark.parametrize("a_posteriori", [False, True])
def test_a_factor_of_an_indefinite_matrix_proves_no_positive_bound(a_posteriori, exact_eigenvalues):
    # Rounding gives Gram matrices of rank 3 a fourth eigenvalue of either sign: Cholesky does not tell.
    fooled = 0
    for seed in range(60):
        rows = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        matrix = rows @ rows.T
        exact = exact_eigenvalues((matrix + matrix.T) / 2)[0]
        factor = shifted_cholesky(symmetric_matrix((matrix + matrix.T) / 2), 0.0, a_posteriori=a_posteriori)
        if factor is not None:
            fooled += exact < 0
            assert factor.lower <= exact
    assert fooled > 0, "the trap of this test is not there"


@pytest.mark.parametrize("decades", [0, 6, 12])
@pytest.mark.parametrize("size", [3, 50, 200])
def test_the_library_keeps_to_the_bound_that_is_assumed_of_it(size, decades, with_spectrum):
    a = symmetric_matrix(with_spectrum(torch.logspace(0, -decades, size, dtype=torch.float64)))
    factor = shifted_cholesky(a, -2 * rounding_level(a)).factor.numpy().astype(np.longdouble)
    target = a.matrix.numpy().astype(np.longdouble) + np.longdouble(2 * rounding_level(a)) * np.eye(size)
    assert not np.triu(factor, 1).any()
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("no extended precision here")
    error = np.sqrt(((factor @ factor.T - target) ** 2).sum())
    assert error <= rounding_level(a)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.125])
@pytest.mark.parametrize("sign", [1, -1])
def test_factor_and_solve_are_those_of_the_shifted_matrix(sign, shift, with_spectrum):
    eigenvalues = torch.linspace(0.25, 2.0, 600, dtype=torch.float64)
    a = symmetric_matrix(sign * with_spectrum(eigenvalues))
    before = a.matrix.clone()
    memory = torch.empty(600, 600, dtype=torch.float64)
    found = shifted_cholesky(a, shift, sign=sign, out=memory)
    assert torch.equal(a.matrix, before)
    shifted = sign * before - shift * torch.eye(600).double()
    torch.testing.assert_close(found.factor @ found.factor.T, shifted, rtol=0, atol=1e-13)
    assert found.factor.data_ptr() == memory.data_ptr()
    columns = torch.randn(600, 3, dtype=torch.float64)
    torch.testing.assert_close(shifted @ found.solve(columns), columns, rtol=0, atol=1e-11)
    assert found.lower <= 0.25
    assert shifted_cholesky(a, 0.3, sign=sign) is None
    assert shifted_cholesky(a, 2.5, sign=sign) is None


def test_the_rounding_of_the_shift_is_counted():
    # 1 - 2^-54 rounds to 1: the factor is that of the unshifted identity, whose trace and largest entry are 1.
    a = symmetric_matrix(torch.ones(1, 1, dtype=torch.float64))
    factor = shifted_cholesky(a, 2.0**-54)
    assert factor.lower <= 2.0**-54 - 2.0**-53


def test_a_matrix_that_is_not_quite_symmetric_gets_a_wider_bound(with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 20, dtype=torch.float64))
    skewed = matrix.clone()
    skewed[3, 5] += 1e-13
    exact, wider = (shifted_cholesky(symmetric_matrix(m), 0.5) for m in (matrix, skewed))
    assert exact.lower - wider.lower >= 1e-13
    assert symmetric_matrix(matrix).skew == 0


@pytest.mark.parametrize("size", [1, 5, 40])
def test_rayleigh_quotient_is_within_its_rounding_of_the_exact_one(size, with_spectrum):
    for decades in (0, 8, 16):
        a = symmetric_matrix(with_spectrum(torch.logspace(0, -decades, size, dtype=torch.float64)))
        for vector in (torch.randn(size).double(), torch.linalg.eigh(a.matrix)[1][:, 0]):
            value, error = a.rayleigh(vector)
            exact = _fraction_quotient(a.matrix, vector)
            assert abs(value - exact) <= error
            assert error <= 1e-13 * size


def _fraction_quotient(matrix, vector):
    from fractions import Fraction

    entries = [Fraction(v) for v in vector.tolist()]
    rows = [[Fraction(v) for v in row] for row in matrix.tolist()]
    product = sum(
        x * sum(a * y for a, y in zip(row, entries, strict=True)) for x, row in zip(entries, rows, strict=True)
    )
    return product / sum(x * x for x in entries)


def test_a_useless_vector_is_refused():
    a = symmetric_matrix(torch.eye(3).double())
    for vector in (torch.zeros(3).double(), torch.full((3,), math.nan).double()):
        with pytest.raises(torch.linalg.LinAlgError, match="zero or not finite"):
            a.rayleigh(vector)
