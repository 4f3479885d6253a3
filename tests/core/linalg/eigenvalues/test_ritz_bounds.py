"""Ritz values of operators against dense eigenvalues, and what they do not prove."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv import NTKOperator, kernel_spectrum, ntk_gram
from lightning_conv.linalg.eigenvalues import ritz_bounds


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    steps=st.integers(1, 30),
    block=st.integers(1, 3),
    decades=st.floats(0, 12),
    seed=st.integers(0, 99),
)
@example(size=19, steps=3, block=3, decades=1e-14, seed=3)  # the last block but one shrinks
def test_ritz_values_lie_inside_the_spectrum_and_residual_intervals_hold_an_eigenvalue(
    size, steps, block, decades, seed, with_spectrum
):
    matrix = with_spectrum(torch.logspace(0, -decades, size, dtype=torch.float64), seed)
    exact = np.linalg.eigvalsh(matrix.numpy())
    found = ritz_bounds(lambda v: matrix @ v, size, steps=steps, block=min(block, size), seed=seed)
    assert exact[0] <= found.lambda_min.upper + 1e-15
    assert found.lambda_max.lower <= exact[-1] + 1e-15
    for end in (found.lambda_min, found.lambda_max):
        assert not end.certified
        assert end.lower <= end.value <= end.upper
        # The residual speaks of both sides of the Ritz value; the side that Courant-Fischer rules out is cut off.
        radius = max(end.upper - end.value, end.value - end.lower)
        assert (np.abs(exact - end.value) <= radius + 1e-15).any()
    for value, residual in zip(found.values.tolist(), found.residuals.tolist(), strict=True):
        assert np.abs(exact - value).min() <= residual + 1e-14


def test_the_ends_converge(with_spectrum):
    matrix = with_spectrum(torch.cat([torch.tensor([-3.0]), torch.linspace(1, 2, 98), torch.tensor([9.0])]).double())
    found = ritz_bounds(lambda v: matrix @ v, 100, steps=30)
    assert found.lambda_min.value == pytest.approx(-3, abs=1e-10)
    assert found.lambda_max.value == pytest.approx(9, abs=1e-10)
    assert found.lambda_min.upper - found.lambda_min.lower < 1e-8
    assert not found.invariant


def test_the_residual_interval_need_not_hold_the_smallest_eigenvalue():
    diagonal = torch.linspace(1, 2, 20, dtype=torch.float64)
    diagonal[3] = 0.5
    start = torch.ones(20, dtype=torch.float64)
    start[3] = 0
    found = ritz_bounds(lambda v: diagonal[:, None] * v, 20, steps=20, start=start)
    assert found.lambda_min.lower > 0.9  # wrong about lambda_min = 0.5, and not certified for that reason
    assert found.lambda_min.upper >= 0.5  # the proven side
    assert not found.lambda_min.certified
    assert found.invariant


def test_a_semidefinite_operator_has_no_negative_bound():
    factor = torch.randn(30, 4, dtype=torch.float64)
    for semidefinite in (False, True):
        found = ritz_bounds(lambda v: factor @ (factor.T @ v), 30, steps=10, semidefinite=semidefinite)
        assert (found.lambda_min.lower < 0) is not semidefinite
        assert found.lambda_min.lower <= found.lambda_min.value <= found.lambda_min.upper
        assert found.lambda_min.upper < 1e-12


def test_blocks_see_multiplicities():
    diagonal = torch.tensor([1.0] * 5 + [2.0] * 5, dtype=torch.float64)[:, None]
    assert len(ritz_bounds(lambda v: diagonal * v, 10, block=1).values) == 2
    assert len(ritz_bounds(lambda v: diagonal * v, 10, block=3).values) == 6


def test_float32_operators_are_allowed_their_rounding():
    matrix = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))
    matrix = matrix @ matrix.T
    exact = torch.linalg.eigvalsh(matrix.double())
    found = ritz_bounds(lambda v: matrix @ v, 60, steps=60, dtype=torch.float32)
    assert found.values.dtype == torch.float32
    assert found.lambda_max.lower <= float(exact[-1]) <= found.lambda_max.upper
    assert found.lambda_min.upper >= float(exact[0])
    mixed = ritz_bounds(lambda v: (matrix @ v.float()).double(), 60, steps=60)
    assert mixed.lambda_max.value == pytest.approx(float(exact[-1]), rel=1e-5)


def test_an_operator_that_is_not_symmetric_is_refused():
    matrix = torch.randn(20, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="matvec: not symmetric"):
        ritz_bounds(lambda v: matrix @ v, 20)


# --- of an operator --------------------------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 2)), torch.randn(12, 5)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
def test_the_spectrum_of_an_operator_is_that_of_the_dense_kernel(outputs, dtype):
    model, inputs = small_network()
    exact = kernel_spectrum(ntk_gram(model, inputs, outputs=outputs, precision="certified"))
    operator = NTKOperator(model, inputs, outputs=outputs, dtype=dtype)
    found = kernel_spectrum(operator)
    for end, true in ((found.lambda_min, exact.lambda_min), (found.lambda_max, exact.lambda_max)):
        assert end.lower <= true.value <= end.upper
        assert (end.upper - end.lower) < (1e-4 if dtype is None else 1e-10) * exact.lambda_max.value
        assert not end.certified
    assert (found.eigenvalues, found.radius, found.trace) == (None, None, None)
    for method in ("auto", "extremes"):
        assert kernel_spectrum(operator, method=method) == found


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_few_products_with_an_operator_bound_from_one_side(steps):
    model, inputs = small_network()
    exact = kernel_spectrum(ntk_gram(model, inputs, precision="certified"))
    found = kernel_spectrum(NTKOperator(model, inputs, outputs="trace"), steps=steps)
    assert 0 <= found.lambda_min.lower <= found.lambda_min.value
    assert exact.lambda_min.value <= found.lambda_min.upper
    assert found.lambda_max.lower <= exact.lambda_max.value
    assert found.condition_number <= exact.condition_number * (1 + 1e-6)


def test_what_needs_a_matrix_is_refused_for_an_operator():
    operator = NTKOperator(*small_network())
    with pytest.raises(ValueError, match=r"method: 'dense' needs the matrix.*operator\.dense\(\)"):
        kernel_spectrum(operator, method="dense")
    with pytest.raises(ValueError, match=r"effective_rank: needs every eigenvalue.*dense\(\)"):
        kernel_spectrum(operator).effective_rank  # noqa: B018
    with pytest.raises(TypeError, match="gram: got ndarray; need a KernelGram, a symmetric matrix or an NTKOperator"):
        kernel_spectrum(np.eye(3))
