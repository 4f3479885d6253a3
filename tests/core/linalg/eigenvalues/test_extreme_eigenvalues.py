"""The outermost eigenvalues against exact spectra, fifty-digit arithmetic, and solvers that fail."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_conv.linalg.eigenvalues import largest, largest_eigenvalue, smallest, smallest_eigenvalue
from lightning_conv.linalg.eigenvalues.largest import complement_bound
from lightning_conv.linalg.eigenvalues.symmetric import symmetric_matrix

BOTH = pytest.mark.parametrize("end", [0, -1], ids=["smallest", "largest"])
SMALLEST = 2 * 5e-324
"""Two steps between numbers near zero: an interval of subnormal numbers is no closer."""
COMPUTE = {0: smallest_eigenvalue, -1: largest_eigenvalue}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


SPECTRA = {
    "decaying": lambda n, d: torch.logspace(0, -d, n, dtype=torch.float64),
    "singular": lambda n, d: torch.cat([torch.zeros(n // 2), torch.logspace(0, -d, n - n // 2)]).double(),
    "clustered": lambda n, d: 1 + 10**-d * torch.arange(n, dtype=torch.float64),
    "indefinite": lambda n, d: torch.linspace(-1, 10**-d, n, dtype=torch.float64),
    "negative": lambda n, d: -torch.logspace(0, -d, n, dtype=torch.float64),
    "slightly indefinite": lambda n, d: torch.cat([tensor(-(10**-d)), torch.ones(n - 1).double()]),
}


@BOTH
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    kind=st.sampled_from(sorted(SPECTRA)),
    size=st.integers(1, 8),
    decades=st.floats(0, 18),
    exponent=st.sampled_from([-1000, -30, 0, 30, 1000]),
    seed=st.integers(0, 9),
)
def test_bounds_hold_whatever_the_spectrum(end, kind, size, decades, exponent, seed, with_spectrum, exact_eigenvalues):
    matrix = with_spectrum(SPECTRA[kind](size, decades), seed) * 2.0**exponent
    exact = exact_eigenvalues(matrix)[end]
    found = COMPUTE[end](matrix)
    assert found.certified
    assert found.lower <= exact <= found.upper
    assert found.lower <= found.value <= found.upper
    # Never much wider than what was asked for and what the rounding of such a matrix leaves open.
    assert found.upper - found.lower <= 3e-6 * abs(float(exact)) + 6e-14 * float(matrix.abs().max()) + SMALLEST


@BOTH
@pytest.mark.parametrize("power", [7, 13, 20, 27, 33, 40])
@pytest.mark.parametrize("size", [8, 64, 256])
def test_bounds_hold_exactly_known_eigenvalues(size, power, end, dyadic):
    matrix, exact = dyadic(size, power)
    found = COMPUTE[end](matrix)
    assert found.lower <= exact[end] <= found.upper
    assert found.reason == "" or (end == 0 and power == 40)
    if power <= 33:
        assert found.lower > 0
        assert found.upper - found.lower <= 1e-5 * exact[end] + 1e-15 * size * exact.sum()


@pytest.mark.parametrize("decades", [4, 8, 10, 12, 13, 14, 16])
def test_lambda_min_is_certified_down_to_the_rounding_level_and_never_wrongly(
    decades, with_spectrum, exact_eigenvalues
):
    matrix = with_spectrum(torch.logspace(0, -decades, 14, dtype=torch.float64))
    exact = exact_eigenvalues(matrix)[0]
    found = smallest_eigenvalue(matrix)
    assert found.lower <= exact <= found.upper
    level = 14 * 2.0**-53 * float(matrix.trace())
    if exact > 4 * level:
        assert found.lower > 0
        assert abs(found.value - exact) <= 1e-2 * exact
    if exact < level:
        assert found.lower < 0
        assert "rounding level" in found.reason


@BOTH
@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1e-300, 1e300, 5e-324])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_multiples_of_the_identity(size, factor, end):
    found = COMPUTE[end](factor * torch.eye(size, dtype=torch.float64))
    assert found.lower <= factor <= found.upper
    assert found.value == pytest.approx(factor, rel=1e-6)
    assert found.upper - found.lower <= 3e-6 * abs(factor) + 2e-323


@BOTH
def test_two_by_two_closed_forms(end):
    for a, b in ((2.0, 1.0), (0.0, 1.0), (1.0, -1.0), (-5.0, 0.5), (1.0, 2.0**-30)):
        found = COMPUTE[end](tensor([a, b], [b, a]))
        exact = a - abs(b) if end == 0 else a + abs(b)
        assert found.lower <= exact <= found.upper


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 40), decades=st.floats(0, 12), seed=st.integers(0, 99), shift=st.integers(-8, 8))
def test_laws_of_permutation_shift_and_sign(size, decades, seed, shift, with_spectrum):
    # Multiples of 2^-40 below 2^10: adding an integer to the diagonal is then exact.
    matrix = (with_spectrum(torch.logspace(0, -decades, size, dtype=torch.float64), seed) * 2.0**40).round() * 2.0**-40
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    low, high = smallest_eigenvalue(matrix), largest_eigenvalue(matrix)
    moved = smallest_eigenvalue(matrix[order][:, order])
    assert max(low.lower, moved.lower) <= min(low.upper, moved.upper)
    shifted = smallest_eigenvalue(matrix + shift * torch.eye(size).double())
    assert max(low.lower + shift, shifted.lower) <= min(low.upper + shift, shifted.upper) + 1e-15 * abs(shift)
    mirrored = largest_eigenvalue(-matrix)
    assert max(-low.upper, mirrored.lower) <= min(-low.lower, mirrored.upper)
    assert low.lower <= float(matrix.diagonal().min())
    assert high.upper >= float(matrix.diagonal().max())


def test_large_and_small_scales_give_the_same_statement(with_spectrum):
    matrix = with_spectrum(torch.logspace(0, -5, 30, dtype=torch.float64))
    for compute in COMPUTE.values():
        here = compute(matrix)
        for exponent in (-900, -150, 150, 900):
            there = compute(matrix * 2.0**exponent)
            for name in ("value", "lower", "upper"):
                assert math.ldexp(getattr(there, name), -exponent) == pytest.approx(getattr(here, name), rel=1e-9)


def test_the_matrix_is_left_alone_and_the_seed_decides(with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 60, dtype=torch.float64))
    before, state = matrix.clone(), torch.get_rng_state()
    assert smallest_eigenvalue(matrix) == smallest_eigenvalue(matrix)
    assert largest_eigenvalue(matrix) == largest_eigenvalue(matrix)
    smallest_eigenvalue(-matrix)
    assert torch.equal(matrix, before)
    assert torch.equal(torch.get_rng_state(), state)


# --- lambda_max from a subspace -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 8), count=st.integers(1, 8), dominance=st.floats(0, 3), seed=st.integers(0, 999))
def test_complement_bound_holds_for_any_subspace(size, count, dominance, seed, with_spectrum, exact_eigenvalues):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(size, generator=generator, dtype=torch.float64)
    spectrum[0] += 10**dominance
    matrix = with_spectrum(spectrum, seed)
    vectors = torch.linalg.eigh(matrix)[1].flip(1)[:, : min(count, size)]
    for noise in (0.0, 1e-8, 1e-3, 0.3):
        basis = torch.linalg.qr(vectors + noise * torch.randn(vectors.shape, generator=generator).double())[0]
        assert complement_bound(symmetric_matrix(matrix), basis) >= exact_eigenvalues(matrix, 30)[-1]


def test_complement_bound_is_nearly_exact_for_a_kernel_like_spectrum(with_spectrum):
    matrix = with_spectrum(torch.cat([tensor(100.0), torch.logspace(0, -6, 299, dtype=torch.float64)]))
    found = largest_eigenvalue(matrix)
    assert found.method == "Lanczos, Frobenius norm of the rest"
    assert found.upper - found.lower <= 1e-6 * 100
    assert found.upper <= 100 + 1e-8
    assert found.lower <= torch.linalg.eigvalsh(matrix)[-1] + 1e-11
    assert found.upper >= torch.linalg.eigvalsh(matrix)[-1] - 1e-11


def test_complement_bound_gives_the_frobenius_norm_where_it_knows_nothing():
    a = symmetric_matrix(torch.eye(50).double())
    assert complement_bound(a, torch.eye(50).double()[:, :3]) == pytest.approx(50**0.5)
    skewed = torch.eye(50).double()[:, :3] * 1.1
    assert complement_bound(a, skewed) == pytest.approx(50**0.5)


# --- Lanczos that is misled, factorisations that fail ---------------------------------------------------------------


def blind_to(index, module, monkeypatch, size):
    """Make Lanczos start from a vector without any part in coordinate ``index``."""
    start = torch.ones(size, dtype=torch.float64)
    start[index] = 0
    original = module.lanczos
    monkeypatch.setattr(module, "lanczos", lambda *args, **options: original(*args, **(options | {"start": start})))


def test_a_start_that_misses_the_smallest_eigenvalue_widens_the_bounds_and_breaks_nothing(monkeypatch):
    diagonal = torch.linspace(1, 2, 10, dtype=torch.float64)
    diagonal[4] = 0.5
    blind_to(4, _module(smallest), monkeypatch, 10)
    found = smallest_eigenvalue(torch.diag(diagonal))
    assert found.value == pytest.approx(1.0, abs=1e-9)  # Lanczos saw no smaller one
    assert -1e-13 < found.lower <= 0.5  # and the proof did not follow
    assert found.reason == "no factor close to the Rayleigh quotient"


def test_a_start_that_misses_the_largest_eigenvalue_ends_in_a_full_decomposition(monkeypatch):
    diagonal = torch.linspace(1, 2, 10, dtype=torch.float64)
    diagonal[4] = 5.0
    blind_to(4, _module(largest), monkeypatch, 10)
    found = largest_eigenvalue(torch.diag(diagonal))
    assert found.lower <= 5.0 <= found.upper
    assert found.upper - found.lower < 1e-12
    assert found.method == "residual bound"
    assert "no Cholesky factor close above" in found.reason


def _module(name):
    import importlib

    return importlib.import_module(f"lightning_conv.linalg.eigenvalues.{name.__name__.rpartition('.')[2]}")


def raises(*_, **__):
    raise torch.linalg.LinAlgError("injected")


@BOTH
def test_a_library_that_raises_leads_to_the_full_decomposition_with_the_reason(end, monkeypatch, with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 30, dtype=torch.float64))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", raises)
    found = COMPUTE[end](matrix)
    exact = {0: 1.0, -1: 2.0}[end]
    assert found.lower - 1e-14 <= exact <= found.upper + 1e-14
    assert found.certified
    assert found.method == "residual bound"
    assert found.reason == "full decomposition, because: injected"


def test_a_matrix_without_any_factor_goes_to_the_full_decomposition(monkeypatch, with_spectrum):
    def fails(matrix, *, out):
        out[1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    found = smallest_eigenvalue(with_spectrum(torch.linspace(1, 2, 12, dtype=torch.float64)))
    assert found.value == pytest.approx(1.0)
    assert "no Cholesky factor below the spectrum" in found.reason


@BOTH
def test_failures_add_up_in_the_reason_and_the_last_one_is_raised(end, monkeypatch, with_spectrum):
    matrix = with_spectrum(torch.linspace(1, 2, 12, dtype=torch.float64))
    original, calls = torch.linalg.eigh, []

    def fails(times, matrix):
        calls.append(1)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError(f"failure {len(calls)}")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", functools.partial(fails, 2))
    found = COMPUTE[end](matrix)
    assert "because: failure 1" in found.reason
    assert "because: failure 2" in found.reason
    assert found.value == pytest.approx({0: 1.0, -1: 2.0}[end])
    calls.clear()
    monkeypatch.setattr(torch.linalg, "eigh", functools.partial(fails, 99))
    with pytest.raises(torch.linalg.LinAlgError, match="failure 3"):
        COMPUTE[end](matrix)


# --- refusals -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"matrix: shape \(2, 3\)"),
        (torch.zeros(0, 0, dtype=torch.float64), r"matrix: shape \(0, 0\)"),
        (torch.eye(3), r"matrix: torch\.float32; need float64"),
        (torch.full((2, 2), math.nan, dtype=torch.float64), "matrix: contains NaN"),
        (tensor([1.0, math.inf], [math.inf, 1.0]), "matrix: contains NaN or inf"),
        (tensor([1.0, 0.1], [0.2, 1.0]), "matrix: not symmetric"),
    ],
)
def test_what_has_no_such_eigenvalue_is_refused(matrix, message, end):
    with pytest.raises(ValueError, match=message):
        COMPUTE[end](matrix)


@BOTH
@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, math.nan])
def test_a_tolerance_that_means_nothing_is_refused(tolerance, end):
    with pytest.raises(ValueError, match=r"tolerance: .*between 0 and 1"):
        COMPUTE[end](torch.eye(2).double(), tolerance=tolerance)
