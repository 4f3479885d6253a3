"""Certificates of features of every size: right against many digits, or refused in a sentence; never a rank that is not there."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from lightning_conv import certify_expressivity
from lightning_conv.expressivity import closest_rows
from lightning_conv.expressivity.decomposition import decompose
from lightning_conv.expressivity.practical import halving_steps, impractical
from lightning_conv.expressivity.singular import certify_held, feature_rounding
from lightning_conv.expressivity.stream import HeldRows
from lightning_conv.expressivity.streamed import certify_streamed

EXPONENTS = [-1073, -1040, -1000, -600, -532, -201, -150, 0, 150, 201, 532, 600, 1000, 1018]


def times(values, exponent):
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_singular_values(features, bias):
    # Elements from 1e-320 to 1e308 beside a one: as many digits as their squares span.
    with mpmath.workdps(60):
        rows = [[*row, 1.0] if bias else row for row in features.tolist()]
        largest = max(abs(mpmath.mpf(x)) for row in rows for x in row)
        a = mpmath.matrix(rows) / largest
    with mpmath.workdps(1400 if bias else 120):
        squares = mpmath.eigsy(a * a.T, eigvals_only=True)
        return [mpmath.sqrt(max(square, 0)) * largest for square in squares]  # ascending


HOW = {
    "singular": lambda h, bias: certify_held(h, bias=bias),
    "streamed": lambda h, bias: certify_streamed(HeldRows(h), bias=bias, tile=2),
}


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("how", sorted(HOW))
def test_without_a_bias_the_bounds_are_right_and_tight_at_every_size(exponent, how):
    for seed in range(8):
        h = times(rand(4, 6, seed=seed), exponent)
        values = exact_singular_values(h, bias=False)
        found = HOW[how](h, False)
        with mpmath.workdps(60):
            assert found.sigma_min.lower <= values[0] <= found.sigma_min.upper
            assert found.sigma_max.lower <= values[-1] <= found.sigma_max.upper
            # A subnormal matrix is another matrix: its sigma_min may be zero.
            if exponent > -1000 and values[0] > 1e-5 * values[-1]:
                assert found.verdict == "certified"
                assert found.rank_lower == 4
                assert found.sigma_min.certified
                assert found.sigma_min.upper - found.sigma_min.lower <= 0.02 * float(values[0])


@pytest.mark.parametrize("exponent", [-1040, -600, -532, -201, 201, 532, 600, 1000])
@pytest.mark.parametrize("how", sorted(HOW))
def test_beside_the_ones_the_bounds_are_right_at_every_size(exponent, how):
    h = times(rand(3, 4), exponent)
    values = exact_singular_values(h, bias=True)
    found = HOW[how](h, True)
    with mpmath.workdps(60):
        assert found.sigma_min.lower <= values[0] <= found.sigma_min.upper
        assert found.sigma_max.lower <= values[-1] <= found.sigma_max.upper
    # Tiny features beside ones are below the rounding of the ones; huge ones have rank 3 without them.
    assert found.verdict == ("undecided" if exponent < 0 else "certified")


@pytest.mark.parametrize("exponent", [-600, 0, 600])
@pytest.mark.parametrize("how", sorted(HOW))
def test_a_rank_that_is_not_there_is_certified_at_no_size(exponent, how):
    basis = rand(2, 6)
    mixture = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    found = HOW[how](times(mixture @ basis, exponent), False)
    assert found.verdict == "undecided"
    assert found.rank_lower <= 2
    assert found.sigma_min.lower == 0


def test_a_killed_certificate_of_tiny_features_resumes_at_its_scale(tmp_path):
    h = times(rand(8, 9), -700)
    first = certify_streamed(HeldRows(h), bias=False, tile=2, folder=tmp_path)
    again = certify_streamed(HeldRows(h), bias=False, tile=2, folder=tmp_path)
    assert first.verdict == again.verdict == "certified"
    assert first.sigma_min == again.sigma_min


def test_the_decomposition_of_a_moderate_matrix_is_not_scaled():
    assert decompose(rand(3, 3)).exponent == 0
    assert decompose(times(rand(3, 3), 300)).exponent > 200


# --- alignment ------------------------------------------------------------------------------------------------------


def exact_residual(a, y):
    with mpmath.workdps(80):
        a, y = (
            mpmath.matrix(each.tolist()) / max(abs(mpmath.mpf(x)) for row in each.tolist() for x in row)
            for each in (a, y)
        )
        weights = (a.T * a) ** -1 * (a.T * y)
        return mpmath.mnorm(y - a * weights, "f") / mpmath.mnorm(y, "f")


@pytest.mark.parametrize("exponent", [-1000, -532, -201, 0, 201, 532, 1000])
@pytest.mark.parametrize("of_targets", [-1000, 0, 1000])
def test_the_share_of_the_targets_out_of_reach_has_no_scale(exponent, of_targets):
    for seed in range(10):
        h, y = rand(6, 2, seed=seed), rand(6, 2, seed=seed + 100)
        if seed % 2:
            y = h @ rand(2, 2, seed=seed) + 1e-9 * y * (seed % 3 > 0)  # in reach, up to rounding, or nearly so
        h, y = times(h, exponent), times(y, of_targets)
        found = certify_expressivity(h, method="alignment", targets=y, bias=False)
        with mpmath.workdps(60):
            assert found.residual.lower <= exact_residual(h, y) <= found.residual.upper
        assert found.verdict == ("certified" if seed % 2 and seed % 3 == 0 else "refuted")
        assert found.residual.upper - found.residual.lower < 1e-9


# --- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1073, -1040, -600, -532, 0, 532, 600, 998])
def test_distances_are_right_at_every_size(exponent):
    for seed in range(10):
        rows = times(rand(7, 3, seed=seed), exponent)
        found = closest_rows(rows, block=2)
        with mpmath.workdps(60):
            points = [[mpmath.mpf(x) for x in row] for row in rows.tolist()]
            exact = min(
                mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(points[i], points[j], strict=True)))
                for i in range(7)
                for j in range(i)
            )
            assert found.distance.lower <= exact <= found.distance.upper
        assert (found.distance.value == 0) == (exact == 0)


@pytest.mark.parametrize("gap", [5e-324, 1e-310, 1e-200, 1e-170])
@pytest.mark.parametrize("size", [0.0, 1e-160, 1.0, 1e160, 1e300])
def test_two_rows_that_differ_are_distinct_whatever_stands_beside_them(gap, size):
    rows = torch.tensor([[0.0, 1.0], [gap, 1.0], [size, -1.0]], dtype=torch.float64)
    found = closest_rows(rows)
    assert (found.first, found.second) == (0, 1)
    assert 0 < found.distance.lower <= gap <= found.distance.upper
    certificate = certify_expressivity(rand(3, 5), method="distinct", entering=rows)
    assert certificate.verdict == "certified"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distance_are_refused_by_name(value):
    rows = rand(5, 3)
    rows[2, 1] = value
    with pytest.raises(ValueError, match=r"matrix: row 2 .* NaN or infinite"):
        closest_rows(rows)
    with pytest.raises(ValueError, match=r"entering: sample 2 .* NaN or infinite"):
        certify_expressivity(rand(5, 6), method="distinct", entering=rows)
    for method in ("singular", "alignment"):
        with pytest.raises(ValueError, match=r"features: sample 2 .* NaN or infinite"):
            certify_expressivity(rows, method=method, targets=rand(5, 1))


def test_rows_whose_distances_overflow_are_refused():
    with pytest.raises(ValueError, match=r"matrix: entries of up to 1.6e\+308, whose distances overflow; divide"):
        closest_rows(torch.tensor([[-1.6e308], [1.6e308]], dtype=torch.float64))


# --- the rounding inside the trunk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [math.nan, -1e-12])
@pytest.mark.parametrize("method", ["singular", "distinct", "alignment"])
def test_an_allowance_that_is_no_norm_is_refused(error, method):
    with pytest.raises(ValueError, match=r"feature_error: .*; need a Frobenius norm"):
        certify_expressivity(rand(4, 5), method=method, entering=rand(4, 3), targets=rand(4, 1), feature_error=error)
    with pytest.raises(ValueError, match="feature_error"):
        certify_streamed(HeldRows(rand(4, 5)), feature_error=error)


def test_a_rounding_error_whose_square_vanishes_is_not_zero():
    exact = torch.full((2, 2), 1e-170, dtype=torch.float64)
    assert feature_rounding(exact.float(), exact) == pytest.approx(16 * 2.0**-29 * 2e-170, rel=1e-12)
    found = certify_expressivity(exact.float(), recompute=lambda: times(torch.eye(2).double(), -600), bias=False)
    assert found.feature_error > 0
    assert not found.sigma_min.certified


@pytest.mark.parametrize("exponent", [-700, 0, 700])
@pytest.mark.parametrize("how", [certify_held, lambda h, **options: certify_streamed(HeldRows(h), **options)])
def test_the_allowance_is_in_the_units_of_the_features(exponent, how):
    h = times(torch.eye(3, dtype=torch.float64), exponent)
    for share, verdict in ((0.5, "certified"), (2.0, "undecided")):
        found = how(h, bias=False, feature_error=share * 2.0**exponent)
        assert found.verdict == verdict
        assert found.sigma_min.lower <= max(1 - share, 0) * 2.0**exponent
        assert (1 + share) * 2.0**exponent <= found.sigma_min.upper or verdict == "undecided"


# --- these weights, and every weight --------------------------------------------------------------------------------


def coinciding(method, features, **options):
    if method == "distinct":
        return certify_expressivity(rand(len(features), 9), method=method, entering=features, **options)
    if method == "streamed":
        return certify_streamed(HeldRows(features), **options)
    return certify_expressivity(features, method="singular", **options)


@pytest.mark.parametrize("method", ["singular", "streamed", "distinct"])
def test_equal_features_of_distinct_inputs_are_refuted_at_these_weights_only(method):
    features = rand(4, 8)
    features[3] = features[1]
    for same, hint in ((None, "unless they are equal"), (lambda i, j: False, "other weights may separate them")):
        found = coinciding(method, features, same_inputs=same)
        assert found.verdict == "refuted"
        assert found.at_these_weights
        assert "samples 1 and 3 have equal features at these weights" in found.reason
        assert found.reason.endswith(hint)
        assert "duplicate" not in found.reason


@pytest.mark.parametrize("method", ["singular", "streamed", "distinct"])
def test_equal_inputs_are_refuted_at_every_weight(method):
    features = rand(4, 8)
    features[3] = features[1]
    found = coinciding(method, features, same_inputs=lambda i, j: {i, j} == {1, 3})
    assert found.verdict == "refuted"
    assert not found.at_these_weights
    assert "samples 1 and 3 are equal" in found.reason
    assert found.reason.endswith("remove duplicate samples")


def test_a_head_that_is_too_narrow_is_so_at_every_weight():
    assert not certify_expressivity(rand(9, 3), method="singular").at_these_weights


# --- of practical use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [1.0, 0.7, 0.1, 1e-2, 1e-3])
def test_the_slowest_direction_is_halved_after_as_many_steps(smallest):
    steps, error, sigmas = 0, torch.ones(2, dtype=torch.float64), torch.tensor([1.0, smallest], dtype=torch.float64)
    shrink = 1 - sigmas.square() / sigmas.max() ** 2  # gradient descent on the squared loss at 1 / L_H
    while float(error[1]) > 0.5:
        error, steps = error * shrink, steps + 1
    assert max(1, steps - 1) <= halving_steps(1.0, smallest) <= steps + 1e-6


def test_a_rank_that_gradient_steps_cannot_use_says_so():
    diagonal = torch.tensor([1.0, 5e-11], dtype=torch.float64)
    found = certify_expressivity(torch.diag(diagonal), bias=False)
    assert found.verdict == "certified"
    # (1 / 5e-11)^2 ln 2 = 2.8e20
    assert "of no practical use to gradient steps" in found.reason
    assert "about 3e+20 steps to halve" in found.reason
    assert '(step_rule="solve") needs none of them' in found.reason
    assert "practical" not in certify_expressivity(torch.eye(2, dtype=torch.float64), bias=False).reason
    streamed = certify_streamed(HeldRows(torch.diag(torch.tensor([1.0, 1e-4]).double())), bias=False)
    assert "about 7e+07 steps to halve" in streamed.reason
    assert impractical(0.0, 0.0) == ""
    assert halving_steps(1.0, 1e-200) == math.inf
