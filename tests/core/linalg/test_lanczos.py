"""Lanczos against dense eigenvalues, its own recurrence, and operators with few distinct eigenvalues."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_conv.linalg.lanczos import lanczos


def matvec_of(matrix):
    return lambda v: matrix @ v


@pytest.mark.parametrize("block", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [7, 20, 40])
def test_all_steps_give_all_eigenvalues(size, block, with_spectrum):
    matrix = with_spectrum(torch.linspace(-2.0, 5.0, size, dtype=torch.float64))
    krylov = lanczos(matvec_of(matrix), size, steps=size, block=block)
    values, _, residuals = krylov.ritz()
    np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(matrix.numpy()), atol=1e-13)
    assert krylov.invariant
    assert float(residuals.max()) == 0


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 30),
    block=st.integers(1, 4),
    steps=st.integers(1, 12),
    decades=st.floats(0, 14),
    seed=st.integers(0, 9),
)
def test_recurrence_holds_and_the_basis_is_orthonormal(size, block, steps, decades, seed, with_spectrum):
    matrix = with_spectrum(torch.logspace(0, -decades, size, dtype=torch.float64), seed)
    krylov = lanczos(matvec_of(matrix), size, steps=steps, block=min(block, size), seed=seed)
    basis, projected = krylov.basis, krylov.projected
    count = basis.shape[1]
    assert count <= min(size, steps * block)
    torch.testing.assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.T @ matrix @ basis, projected, rtol=0, atol=1e-13)
    outside = matrix @ basis - basis @ projected
    width = krylov.coupling.shape[1]
    assert float(outside[:, : count - width].norm()) < 1e-13
    assert float(outside[:, count - width :].norm() - krylov.coupling.norm()) == pytest.approx(0, abs=1e-13)
    assert krylov.asymmetry < 1e-13


@pytest.mark.parametrize("block", [1, 3])
def test_reported_residuals_are_those_of_the_ritz_pairs(block, with_spectrum):
    matrix = with_spectrum(torch.logspace(0, -6, 50, dtype=torch.float64))
    krylov = lanczos(matvec_of(matrix), 50, steps=6, block=block)
    values, coordinates, residuals = krylov.ritz()
    vectors = krylov.basis @ coordinates
    np.testing.assert_allclose((matrix @ vectors - vectors * values).norm(dim=0).numpy(), residuals.numpy(), atol=1e-14)
    assert float(residuals.max()) > 1e-6


def test_projection_is_block_tridiagonal(with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 30, dtype=torch.float64))
    projected = lanczos(matvec_of(matrix), 30, steps=5, block=3).projected
    assert projected.shape == (15, 15)
    for i in range(5):
        for j in range(5):
            if abs(i - j) > 1:
                assert not projected[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].any()


def test_one_start_vector_gives_the_textbook_coefficients():
    # For a start at e_1, Lanczos on a tridiagonal matrix with positive off-diagonal gives back that matrix.
    alphas, betas = torch.tensor([4.0, 1.0, -3.0, 2.0, 7.0]).double(), torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
    matrix = torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1)
    krylov = lanczos(matvec_of(matrix), 5, steps=5, start=torch.eye(5).double()[0])
    torch.testing.assert_close(krylov.projected.diagonal(), alphas, rtol=0, atol=1e-14)
    torch.testing.assert_close(krylov.projected.diagonal(-1), betas, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("block", "expected"), [(1, [1.0, 4.0]), (2, [1.0, 1.0, 4.0, 4.0]), (3, [1.0] * 3 + [4.0] * 3)]
)
def test_b_start_vectors_meet_b_directions_of_every_eigenspace(block, expected, with_spectrum):
    matrix = with_spectrum(torch.tensor([1.0] * 10 + [4.0] * 10, dtype=torch.float64))
    krylov = lanczos(matvec_of(matrix), 20, steps=20, block=block)
    np.testing.assert_allclose(krylov.ritz()[0].numpy(), expected, atol=1e-13)
    assert krylov.invariant


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1e-140, 1e140])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_multiples_of_the_identity_end_after_one_step(size, factor):
    calls = []
    krylov = lanczos(lambda v: calls.append(1) or factor * v, size, steps=5)
    assert len(calls) == 1
    assert float(krylov.ritz()[0][0]) == pytest.approx(factor, rel=1e-14)


def test_stop_ends_the_recurrence_and_steps_limit_it(with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 40, dtype=torch.float64))
    calls = []

    def counted(v):
        calls.append(v.shape)
        return matrix @ v

    lanczos(counted, 40, steps=20, stop=lambda krylov: krylov.basis.shape[1] >= 6)
    assert calls == [(40, 1)] * 6
    calls.clear()
    lanczos(counted, 40, steps=4, block=2)
    assert calls == [(40, 2)] * 4


def test_the_seed_decides_and_the_global_generator_is_left_alone(with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 12, dtype=torch.float64))
    before = torch.get_rng_state()
    first, again, other = (lanczos(matvec_of(matrix), 12, steps=3, seed=seed).basis for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_an_operator_that_is_not_symmetric_shows():
    matrix = torch.randn(20, 20, dtype=torch.float64)
    assert lanczos(matvec_of(matrix), 20, steps=8).asymmetry > 0.1
    assert lanczos(matvec_of(matrix), 20, steps=1, block=2).asymmetry > 0.01


def test_float32_operators_run_in_float32():
    matrix = torch.diag(torch.linspace(1, 3, 30))
    krylov = lanczos(matvec_of(matrix), 30, steps=30, dtype=torch.float32)
    assert krylov.basis.dtype == torch.float32
    np.testing.assert_allclose(krylov.ritz()[0][[0, -1]].numpy(), [1, 3], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"block": 0}, "block: 0; need 1 to 4"),
        ({"block": 5}, "block: 5; need 1 to 4"),
        ({"start": torch.ones(3).double()}, r"start: shape \(3,\); need \(4,\)"),
        ({"start": torch.zeros(4).double()}, "start: its columns are zero"),
        ({"start": torch.ones(4, 2).double()}, "start: .*dependent"),
        ({"start": torch.ones(4, 5).double()}, "start: .*dependent"),
    ],
)
def test_what_cannot_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, 4, **({"steps": 2} | options))


def test_a_matvec_that_misbehaves_is_refused():
    with pytest.raises(ValueError, match=r"matvec: shape \(4, 1\) became \(4,\)"):
        lanczos(lambda v: v[:, 0], 4, steps=2)
    with pytest.raises(ValueError, match="matvec: returned NaN"):
        lanczos(lambda v: v * float("nan"), 4, steps=2)
