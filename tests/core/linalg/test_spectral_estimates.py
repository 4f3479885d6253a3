"""Largest eigenvalue and effective rank from products, against all eigenvalues."""

import math

import pytest
import torch

from lightning_conv.linalg.spectral_estimates import estimate_effective_rank, estimate_lambda_max

SIZE = 400
INDEX = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "power law": INDEX**-1.5,
    "slow power law": INDEX**-0.5,
    "outlier and bulk": torch.cat(
        [torch.tensor([100.0], dtype=torch.float64), torch.linspace(0.5, 1, SIZE - 1, dtype=torch.float64)]
    ),
    "exponential": torch.exp(-INDEX / 8),
    "flat": torch.ones(SIZE, dtype=torch.float64),
}


def true_rank(values):
    share = values / values.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def counted(matrix):
    seen = []

    def matvec(vectors):
        seen.append(vectors.shape[1])
        return matrix @ vectors

    return matvec, seen


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lambda_max_is_the_largest_eigenvalue_within_the_residual(spectrum, with_spectrum):
    matrix = with_spectrum(SPECTRA[spectrum])
    values = torch.linalg.eigvalsh(matrix)
    matvec, seen = counted(matrix)
    found = estimate_lambda_max(matvec, SIZE, steps=60)
    slack = 1e-12 * float(values[-1])
    assert found.value <= float(values[-1]) + slack
    assert float((values - found.value).abs().min()) <= found.standard_error + slack  # the theorem
    assert found.value == pytest.approx(float(values[-1]), rel=1e-6)
    assert sum(seen) == found.samples <= 61


def test_lambda_max_stops_at_the_tolerance_and_says_what_is_left(with_spectrum):
    matrix = with_spectrum(SPECTRA["slow power law"])
    loose, tight = (estimate_lambda_max(lambda v: matrix @ v, SIZE, tolerance=t) for t in (1e-2, 1e-10))
    assert loose.samples < tight.samples
    assert 1e-12 < loose.standard_error <= 1.01e-2 * loose.value
    assert tight.standard_error <= 1e-9
    few = estimate_lambda_max(lambda v: matrix @ v, SIZE, steps=3, tolerance=1e-10)
    assert few.samples == 4
    assert few.standard_error > 1e-3  # not converged, and it shows


def test_lambda_max_of_negative_and_zero_operators():
    diagonal = torch.linspace(-3, -1, 30, dtype=torch.float64)[:, None]
    assert estimate_lambda_max(lambda v: diagonal * v, 30).value == pytest.approx(-1, rel=1e-10)
    zero = estimate_lambda_max(torch.zeros_like, 30)
    assert (zero.value, zero.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_effective_rank_lies_within_its_standard_error(spectrum, with_spectrum):
    matrix = with_spectrum(SPECTRA[spectrum])
    truth = true_rank(SPECTRA[spectrum])
    found = [estimate_effective_rank(lambda v: matrix @ v, SIZE, probes=6, steps=8, seed=s) for s in range(40)]
    values = torch.tensor([e.value for e in found], dtype=torch.float64)
    slack = 1e-9 * truth  # rounding, where the spectrum makes the estimate exact
    assert sum(abs(e.value - truth) <= 2 * e.standard_error + slack for e in found) >= 32
    assert float(values.mean()) == pytest.approx(truth, rel=0.02)
    assert all(e.standard_error <= 0.1 * truth for e in found)


def test_effective_rank_counts_its_products(with_spectrum):
    matvec, seen = counted(with_spectrum(SPECTRA["power law"]))
    found = estimate_effective_rank(matvec, SIZE, probes=6, steps=8)
    assert sum(seen) == found.samples == 2 * 6 * 8


@pytest.mark.parametrize("size", [1, 5, 96])
def test_effective_rank_of_a_small_operator_is_that_of_all_eigenvalues(size, with_spectrum):
    values = torch.rand(size, dtype=torch.float64)
    matrix = with_spectrum(values)
    found = estimate_effective_rank(lambda v: matrix @ v, size, probes=6, steps=8)
    assert found.value == pytest.approx(true_rank(values), rel=1e-12)
    assert (found.standard_error, found.samples, found.method) == (0.0, size, "all eigenvalues")


def test_effective_rank_of_low_rank_is_exact(with_spectrum):
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:7] = torch.linspace(1, 2, 7, dtype=torch.float64)
    matrix = with_spectrum(values)
    found = estimate_effective_rank(lambda v: matrix @ v, SIZE)
    assert found.value == pytest.approx(true_rank(values[:7]), rel=1e-9)


def test_effective_rank_does_not_depend_on_the_scale(with_spectrum):
    matrix = with_spectrum(SPECTRA["power law"])
    found = [estimate_effective_rank(lambda v, s=s: s * (matrix @ v), SIZE, probes=4, steps=6) for s in (1e-9, 1, 1e9)]
    for other in found[1:]:
        assert other.value == pytest.approx(found[0].value, rel=1e-9)


def test_effective_rank_of_nothing_is_zero():
    for size in (SIZE, 5):
        found = estimate_effective_rank(torch.zeros_like, size)
        assert found.value == 0
        assert found.standard_error == 0
        assert found.method == "the operator is zero or negative"


@pytest.mark.parametrize(("probes", "steps"), [(1, 8), (8, 1)])
def test_too_few_probes_or_steps_are_refused(probes, steps):
    with pytest.raises(ValueError, match=f"probes, steps: {probes}, {steps}"):
        estimate_effective_rank(lambda v: v, 20, probes=probes, steps=steps)
