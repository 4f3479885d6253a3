"""Eigenvalue bounds against matrices with exactly known spectra and against multi-precision arithmetic."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv import kernel_drift, kernel_spectrum, ntk_gram, resolved_spectrum
from lightning_conv.linalg import spectrum as spectrum_module
from lightning_conv.linalg.spectrum import Bounded, Spectrum, eigen_decomposition, residual_radius
from lightning_conv.reporting.plots import plot_spectra


@pytest.mark.parametrize("power", [7, 13, 20, 27, 33, 40])  # lambda_min / lambda_max from 8e-3 to 9e-13
@pytest.mark.parametrize("size", [8, 64, 256])
def test_bounds_hold_the_exactly_known_eigenvalues(size, power, dyadic):
    matrix, exact = dyadic(size, power)
    spectrum = kernel_spectrum(matrix)
    assert spectrum.lambda_min.lower <= exact[0] <= spectrum.lambda_min.upper
    assert spectrum.lambda_max.lower <= exact[-1] <= spectrum.lambda_max.upper
    assert float(np.abs(spectrum.eigenvalues.numpy() - exact).max()) <= spectrum.radius
    assert spectrum.lambda_min.certified
    if size <= 64:
        assert spectrum.lambda_min.lower > 0, "the bound is too wide to be of use"
    assert spectrum.radius < 1e-11


@pytest.mark.parametrize("ratio", [1e-2, 1e-5, 1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("size", [8, 20])
def test_bounds_hold_the_eigenvalues_of_the_rounded_matrix(size, ratio, with_spectrum, exact_eigenvalues):
    matrix = with_spectrum(torch.logspace(0, math.log10(ratio), size, dtype=torch.float64))
    exact = exact_eigenvalues(matrix)
    spectrum = kernel_spectrum(matrix)
    assert spectrum.lambda_min.lower <= exact[0] <= spectrum.lambda_min.upper
    assert spectrum.lambda_max.lower <= exact[-1] <= spectrum.lambda_max.upper
    assert all(abs(v - e) <= spectrum.radius for v, e in zip(spectrum.eigenvalues.tolist(), exact, strict=True))


def test_lambda_min_stays_certified_positive_at_1e_12_of_lambda_max(with_spectrum):
    matrix = with_spectrum(torch.logspace(0, -12, 64, dtype=torch.float64))
    assert kernel_spectrum(matrix).lambda_min.lower > 0


@pytest.mark.parametrize("damage", [0.0, 1e-12, 1e-6, 1e-2])
@pytest.mark.parametrize("what", ["values", "vectors", "scale"])
def test_residual_radius_bounds_every_eigenvalue_even_of_a_damaged_decomposition(
    what, damage, with_spectrum, exact_eigenvalues
):
    matrix = with_spectrum(torch.logspace(0, -6, 10, dtype=torch.float64))
    exact = exact_eigenvalues(matrix, 40)
    values, vectors = torch.linalg.eigh(matrix)
    if what == "values":
        values = values + damage * torch.randn(10, dtype=torch.float64)
        values, order = values.sort()
        vectors = vectors[:, order]
    elif what == "vectors":
        vectors = vectors + damage * torch.randn(10, 10, dtype=torch.float64)
    else:
        vectors = vectors * (1 + damage)
        values = values / (1 + damage) ** 2  # the residual stays zero: only the defect of orthogonality tells
    absolute, relative = residual_radius(matrix, values, vectors)
    for value, truth in zip(values.tolist(), exact, strict=True):
        assert abs(value - truth) <= absolute + relative * abs(value)
    assert absolute + relative <= 1e-13 + 100 * damage


def test_floor_and_jacobian_error_widen_the_bounds_enough():
    exact = torch.randn(6, 40, dtype=torch.float64)
    left, _, right = torch.linalg.svd(exact, full_matrices=False)
    model, inputs = nn.Linear(4, 1).double(), torch.randn(6, 4).double()
    for floor, error in ((0.0, 0.0), (1e-3, 0.0), (0.0, 1e-3), (1e-2, 1e-3)):
        for k, end in ((-1, "lambda_min"), (0, "lambda_max")):
            truth = float(torch.linalg.svdvals(exact)[k].square())
            for sign in (-1, 1):
                # The worst that is allowed: all of both errors on the smallest (or the largest) singular triple.
                size = error * float(exact.norm()) * (1 - 2e-3)  # |J|_F is taken from the computed matrix
                computed = exact + sign * size * torch.outer(left[:, k], right[k])
                matrix = computed @ computed.T + sign * floor * torch.outer(left[:, k], left[:, k])
                matrix = (matrix + matrix.T) / 2
                gram = dataclasses.replace(ntk_gram(model, inputs), matrix=matrix, floor=floor, jacobian_error=error)
                bounded = getattr(kernel_spectrum(gram), end)
                assert bounded.lower - 1e-12 <= truth <= bounded.upper + 1e-12
                assert not bounded.certified
                # Nor is there much to spare: the truth lies near the end of the interval that the errors push it to.
                spare = truth - bounded.lower if sign > 0 else bounded.upper - truth
                assert spare <= 0.02 * (bounded.upper - bounded.lower) + 1e-10
    certified = kernel_spectrum(ntk_gram(model, inputs, precision="certified"))
    assert certified.lambda_min.certified


# --- a float32 network whose smallest eigenvalue float32 cannot see -------------------------------------------------


def nearly_equal_samples(distance, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.Softplus(), nn.Linear(32, 1))
    inputs = torch.randn(8, 10)
    inputs[1] = inputs[0] + distance * torch.randn(10)
    return model, inputs


@pytest.mark.parametrize("distance", [2e-4, 1e-4, 3e-5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resolved_spectrum_is_right_where_a_float32_gram_is_not(seed, distance, naive_jacobian):
    model, inputs = nearly_equal_samples(distance, seed)
    exact = torch.linalg.svdvals(naive_jacobian(model, inputs)).square()
    assert 1e-13 < float(exact[-1] / exact[0]) < 1e-9

    rows = []
    for i in range(8):
        gradients = torch.autograd.grad(model(inputs[i : i + 1])[0, 0], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    naive = torch.stack(rows) @ torch.stack(rows).T
    for wrong in (torch.linalg.eigvalsh(naive)[0], torch.linalg.eigvalsh(naive.double())[0]):
        assert wrong < 0 or abs(wrong - exact[-1]) > 0.5 * exact[-1], "the trap of this test is not there"

    gram, spectrum = resolved_spectrum(model, inputs)
    smallest = spectrum.lambda_min
    assert smallest.resolved
    assert smallest.lower <= float(exact[-1]) <= smallest.upper
    assert abs(smallest.value - float(exact[-1])) <= 0.1 * float(exact[-1])
    assert gram.precision in {"exact", "certified"}


def test_fast_says_itself_that_it_does_not_resolve_such_an_eigenvalue(naive_jacobian):
    model, inputs = nearly_equal_samples(1e-4, 0)
    exact = float(torch.linalg.svdvals(naive_jacobian(model, inputs))[-1].square())
    smallest = kernel_spectrum(ntk_gram(model, inputs, precision="fast")).lambda_min
    assert not smallest.resolved
    assert smallest.lower <= exact <= smallest.upper


def test_resolved_spectrum_stops_at_the_first_precision_that_does():
    model = nn.Linear(10, 1)
    inputs = torch.eye(6, 10)
    assert resolved_spectrum(model, inputs)[0].precision == "fast"
    assert resolved_spectrum(model, inputs, start="exact")[0].precision == "exact"
    assert resolved_spectrum(model, inputs, start="certified")[0].precision == "certified"


def test_equal_samples_are_never_reported_to_have_a_positive_lambda_min():
    model, inputs = nearly_equal_samples(0.0, 0)
    gram, spectrum = resolved_spectrum(model, inputs)
    assert gram.precision == "certified"
    assert spectrum.lambda_min.lower == 0
    assert not spectrum.lambda_min.resolved


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eigenvalues", "effective", "stable", "condition"),
    [
        ([2.0] * 5, 5.0, 5.0, 1.0),
        ([0.0, 0.0, 3.0], 1.0, 1.0, math.inf),
        ([0.25, 0.25, 0.5], 2**1.5, 2.0, 2.0),
        ([-1e-17, 1.0, 1.0], 2.0, 2.0, math.inf),
    ],
)
def test_ranks_and_condition_number_have_their_closed_forms(eigenvalues, effective, stable, condition):
    ends = [Bounded(v, v, v, True, "given") for v in (eigenvalues[0], eigenvalues[-1])]
    spectrum = Spectrum(torch.tensor(eigenvalues, dtype=torch.float64), *ends, 0.0)
    assert spectrum.effective_rank == pytest.approx(effective, rel=1e-12)
    assert spectrum.stable_rank == pytest.approx(stable, rel=1e-12)
    assert spectrum.condition_number == condition


@pytest.mark.parametrize(
    ("value", "lower", "upper", "resolved"),
    [(1.0, 0.95, 1.05, True), (1.0, 0.85, 1.0, False), (1.0, 1.0, 1.2, False), (0.0, 0.0, 0.0, False)],
)
def test_resolved_means_within_a_tenth_to_either_side(value, lower, upper, resolved):
    assert Bounded(value, lower, upper, True, "given").resolved is resolved


# --- a solver that fails --------------------------------------------------------------------------------------------


def failing(times, original, calls):
    def eigh(matrix):
        calls.append(copy.copy(matrix))
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    return eigh


def test_a_failed_decomposition_is_repeated_with_a_shift_that_is_taken_back(monkeypatch, with_spectrum):
    matrix = with_spectrum(torch.tensor([0.0, 0.0, 0.0, 1e-6, 1.0, 5.0], dtype=torch.float64))
    expected = np.linalg.eigvalsh(matrix.numpy())
    calls = []
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh, calls))
    values, vectors = eigen_decomposition(matrix)
    assert len(calls) == 2
    assert not torch.equal(calls[0], calls[1])
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-13)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0, atol=1e-13)


def test_bounds_hold_after_the_fallback_too(monkeypatch, dyadic):
    matrix, exact = dyadic(16, 33)
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh, []))
    spectrum = kernel_spectrum(matrix)
    assert float(np.abs(spectrum.eigenvalues.numpy() - exact).max()) <= spectrum.radius
    assert spectrum.lambda_min.lower <= exact[0] <= spectrum.lambda_min.upper
    assert "did not converge" in spectrum.lambda_min.reason


def test_a_decomposition_that_fails_twice_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", failing(2, torch.linalg.eigh, []))
    with pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        kernel_spectrum(torch.eye(3, dtype=torch.float64))


# --- the outermost two alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [7, 20, 33])
@pytest.mark.parametrize("size", [8, 64, 256])
def test_extremes_hold_the_exactly_known_eigenvalues(size, power, dyadic):
    matrix, exact = dyadic(size, power)
    spectrum = kernel_spectrum(matrix, method="extremes")
    assert 0 < spectrum.lambda_min.lower <= exact[0] <= spectrum.lambda_min.upper
    assert spectrum.lambda_max.lower <= exact[-1] <= spectrum.lambda_max.upper
    assert spectrum.lambda_min.certified
    assert spectrum.lambda_max.certified
    assert spectrum.stable_rank == pytest.approx(exact.sum() / exact[-1], rel=1e-6)
    assert spectrum.condition_number == pytest.approx(exact[-1] / exact[0], rel=1e-3)


def test_auto_is_dense_for_small_kernels_and_not_for_large_ones(with_spectrum, monkeypatch):
    monkeypatch.setattr(spectrum_module, "DENSE_UP_TO", 20)
    small, large = (with_spectrum(torch.linspace(1, 2, n, dtype=torch.float64)) for n in (20, 21))
    assert kernel_spectrum(small, method="auto").eigenvalues is not None
    assert kernel_spectrum(large, method="auto").eigenvalues is None
    assert kernel_spectrum(large).eigenvalues is not None


def test_what_needs_every_eigenvalue_says_so_where_two_are_known():
    spectrum = kernel_spectrum(torch.diag(torch.tensor([1.0, 2.0, 4.0]).double()), method="extremes")
    assert spectrum.eigenvalues is None
    assert spectrum.radius is None
    with pytest.raises(ValueError, match=r'effective_rank: needs every eigenvalue.*method="dense"'):
        _ = spectrum.effective_rank
    with pytest.raises(ValueError, match="plot_spectra: needs every eigenvalue"):
        plot_spectra({"now": spectrum})


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
def test_floor_and_jacobian_error_widen_the_extremes_as_they_widen_the_dense_bounds(precision):
    gram = ntk_gram(
        nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1)), torch.randn(12, 5), precision=precision
    )
    dense, extremes = kernel_spectrum(gram), kernel_spectrum(gram, method="extremes")
    for name in ("lambda_min", "lambda_max"):
        one, other = getattr(dense, name), getattr(extremes, name)
        assert one.certified is other.certified is (precision == "certified")
        # Two tight intervals about the same number, widened by the same errors; 1e-6: the tolerance of the extremes.
        assert other.lower == pytest.approx(one.lower, rel=3e-6)
        assert other.upper == pytest.approx(one.upper, rel=3e-6)
        assert precision in other.method
    assert extremes.stable_rank == pytest.approx(dense.stable_rank, rel=1e-5)


def test_resolved_spectrum_and_drift_work_with_extremes():
    model, inputs = nearly_equal_samples(1e-4, 0)
    gram, spectrum = resolved_spectrum(model, inputs, method="extremes")
    same, dense = resolved_spectrum(model, inputs)
    assert gram.precision == same.precision
    assert spectrum.eigenvalues is None
    assert spectrum.lambda_min.value == pytest.approx(dense.lambda_min.value, rel=1e-4)
    drift = kernel_drift(gram, gram, spectrum=spectrum, reference_spectrum=spectrum)
    assert drift.lambda_min_ratio.lower <= 1 <= drift.lambda_min_ratio.upper


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method: 'lanczos' is not one of 'dense', 'extremes', 'auto'"):
        kernel_spectrum(torch.eye(2).double(), method="lanczos")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"gram: shape \(2, 3\)"),
        (torch.zeros(3, dtype=torch.float64), r"gram: shape \(3,\)"),
        (torch.zeros(0, 0, dtype=torch.float64), r"gram: shape \(0, 0\)"),
        (torch.eye(3), r"gram: torch\.float32; need float64"),
        (torch.full((2, 2), math.nan, dtype=torch.float64), "gram: contains NaN"),
        (torch.tensor([[1.0, math.inf], [math.inf, 1.0]], dtype=torch.float64), "gram: contains NaN or inf"),
        (torch.tensor([[1.0, 0.1], [0.2, 1.0]], dtype=torch.float64), "gram: not symmetric .*1.0e-01"),
    ],
)
def test_what_is_no_kernel_matrix_is_refused(matrix, message):
    for method in ("dense", "extremes", "auto"):
        with pytest.raises(ValueError, match=message):
            kernel_spectrum(matrix, method=method)
