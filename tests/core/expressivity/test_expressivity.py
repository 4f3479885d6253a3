"""Rank certificates against multi-precision singular values."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_conv import certify_expressivity
from lightning_conv.expressivity import closest_rows


def with_ones(features):
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)


def digits(n):
    return torch.from_numpy(load_digits().data[:n] / 16)


def wide_features(inputs, width, sharpness, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs.shape[1], width)  # float32 weights, converted: both types evaluate the same network
    return F.softplus(layer.to(dtype)(inputs.to(dtype)), beta=sharpness).detach()


@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-8, 1e-11])
@pytest.mark.parametrize("shape", [(6, 9), (6, 5), (8, 20)])
def test_bounds_hold_the_exact_singular_values(shape, smallest, exact_singular_values):
    n, width = shape
    features = torch.randn(n, width, dtype=torch.float64)
    features[1] = features[0] + smallest * features[1]
    exact = exact_singular_values(with_ones(features))
    certificate = certify_expressivity(features)
    assert certificate.sigma_min.lower <= exact[n - 1] <= certificate.sigma_min.upper
    assert certificate.sigma_max.lower <= exact[0] <= certificate.sigma_max.upper
    assert certificate.verdict == "certified"
    assert certificate.rank_lower == n
    assert certificate.sigma_min.upper - certificate.sigma_min.lower < 1e-12


@pytest.mark.parametrize("data", ["random", "digits"])
def test_wide_sharp_softplus_features_are_certified(data):
    inputs = digits(60) if data == "digits" else torch.rand(60, 20)
    certificate = certify_expressivity(wide_features(inputs, 200, 100))
    assert certificate.verdict == "certified"
    assert (certificate.rank_lower, certificate.n, certificate.width) == (60, 60, 200)
    assert certificate.sigma_min.lower > 0


def test_the_bias_column_counts():
    features = torch.eye(4, 3, dtype=torch.float64)  # rank 3, and 4 with the column of ones
    assert certify_expressivity(features).verdict == "certified"
    constant = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    assert certify_expressivity(constant).verdict == "refuted"


def test_too_narrow_is_refused_a_certificate_with_the_rank_it_has():
    features = wide_features(digits(30), 12, 100)
    certificate = certify_expressivity(features)
    assert certificate.verdict == "refuted"
    assert certificate.rank_lower == 13
    assert certificate.sigma_min.value == certificate.sigma_min.lower == certificate.sigma_min.upper == 0
    assert "m_H + 1 = 13 < n = 30" in certificate.reason
    assert "at least 29" in certificate.reason


def test_rank_lower_of_a_deficient_matrix_is_its_rank():
    features = torch.randn(10, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
    certificate = certify_expressivity(features)
    assert certificate.verdict == "undecided"
    assert certificate.rank_lower == 4  # 3 and the column of ones


def test_two_equal_samples_are_named():
    features = wide_features(digits(20), 100, 100)
    features[13] = features[4]
    certificate = certify_expressivity(features)
    assert certificate.verdict == "refuted"
    assert "samples 4 and 13" in certificate.reason
    assert certificate.rank_lower == 19


def test_nearly_equal_samples_below_the_bound_are_left_undecided(exact_singular_values):
    features = torch.rand(5, 8, dtype=torch.float64) + 0.5
    features[3] = features[2]
    features[3, 0] = math.nextafter(float(features[2, 0]), 2)
    exact = exact_singular_values(with_ones(features))[-1]
    assert 0 < exact < 1e-15  # the rank is 5, but float64 cannot show it
    certificate = certify_expressivity(features)
    assert certificate.verdict == "undecided"
    assert certificate.rank_lower == 4
    assert certificate.sigma_min.lower <= exact <= certificate.sigma_min.upper
    assert "not above its rounding bound" in certificate.reason


def test_float32_features_need_a_float64_recomputation():
    features = torch.randn(4, 6)
    with pytest.raises(TypeError, match=r"features: torch\.float32.*recompute="):
        certify_expressivity(features)
    with pytest.raises(TypeError, match=r"recompute: returned torch\.float32"):
        certify_expressivity(features, recompute=lambda: features)
    with pytest.raises(TypeError, match=r"recompute: returned .*shape \(3, 6\)"):
        certify_expressivity(features, recompute=lambda: features[:3].double())


def test_certificate_is_right_where_a_float32_rank_is_too_small(exact_singular_values):
    inputs = torch.rand(14, 3)
    coarse, fine = (wide_features(inputs, 40, 1, dtype) for dtype in (torch.float32, torch.float64))
    assert int(torch.linalg.matrix_rank(with_ones(coarse))) < 14
    exact = exact_singular_values(with_ones(fine))
    assert 1e-9 < exact[-1] / exact[0] < 1e-5  # rank 14 to fifty digits
    certificate = certify_expressivity(coarse, recompute=lambda: fine)
    assert certificate.verdict == "certified"
    assert certificate.feature_error > 0
    assert 0 < certificate.sigma_min.lower <= exact[-1] <= certificate.sigma_min.upper


def test_certificate_is_not_fooled_where_float32_rounding_fills_the_matrix_up():
    # Features of rank 2 (3 with the ones) that come out of large sums that cancel.
    base = torch.randint(-64, 64, (2, 3000)).double() + 4096
    mixing = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]]).double()
    weights = torch.randn(3000, 40)
    weights[1500:] = -weights[:1500]
    coarse = (mixing @ base).float() @ weights
    fine = (mixing @ base) @ weights.double()
    assert int(torch.linalg.matrix_rank(with_ones(coarse))) == 4
    certificate = certify_expressivity(coarse, recompute=lambda: fine)
    assert certificate.verdict != "certified"
    assert certificate.rank_lower == 3


def test_feature_error_of_a_recomputation_is_the_measured_float32_error_scaled():
    coarse, fine = (wide_features(digits(10), 50, 100, dtype) for dtype in (torch.float32, torch.float64))
    certificate = certify_expressivity(coarse, recompute=lambda: fine)
    measured = (coarse.double() - fine).square().sum().sqrt()
    assert certificate.feature_error == pytest.approx(float(16 * measured * 2.0**-29), rel=1e-12)


def test_feature_error_widens_the_bounds_and_can_take_the_certificate_back(exact_singular_values):
    features = torch.randn(5, 8, dtype=torch.float64)
    plain = certify_expressivity(features)
    allowed = 0.5 * plain.sigma_min.value
    widened = certify_expressivity(features, feature_error=allowed)
    assert widened.sigma_min.lower == pytest.approx(plain.sigma_min.lower - allowed)
    assert widened.sigma_max.upper == pytest.approx(plain.sigma_max.upper + allowed)
    assert widened.verdict == "certified"
    # Any change of the features of that size stays inside, the worst one included.
    left, _, right = torch.linalg.svd(with_ones(features), full_matrices=False)
    moved = with_ones(features) - allowed * torch.outer(left[:, -1], right[-1])
    assert widened.sigma_min.lower <= float(exact_singular_values(moved)[-1]) + 1e-14
    assert certify_expressivity(features, feature_error=1.1 * plain.sigma_min.value).verdict == "undecided"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_with_non_finite_features_are_named(value):
    features = torch.randn(5, 8, dtype=torch.float64)
    features[2, 3] = features[4, 0] = value
    with pytest.raises(ValueError, match=r"features: sample 2 \(and 1 more\)"):
        certify_expressivity(features)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,), (2, 2, 2)])
def test_what_is_no_feature_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="features: shape"):
        certify_expressivity(torch.zeros(shape, dtype=torch.float64))


def test_a_decomposition_that_fails_leaves_it_undecided(monkeypatch):
    def svd(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", svd)
    certificate = certify_expressivity(torch.eye(3, dtype=torch.float64))
    assert certificate.verdict == "undecided"
    assert certificate.rank_lower == 0
    assert "did not converge" in certificate.reason


def test_closest_rows_agree_with_all_pairs_in_numpy():
    matrix = torch.randn(70, 5, dtype=torch.float64)
    matrix[61] = matrix[12] + 1e-3
    found = closest_rows(matrix, block=16)
    i, j, distance = found.first, found.second, found.distance.value
    pairs = np.linalg.norm(matrix.numpy()[:, None] - matrix.numpy()[None], axis=2)
    pairs[np.tril_indices(70)] = np.inf
    assert (i, j) == np.unravel_index(pairs.argmin(), pairs.shape) == (12, 61)
    assert distance == pytest.approx(pairs.min(), rel=1e-12)


@pytest.mark.parametrize(("known", "verdict"), [(None, "undecided"), (False, "undecided"), (True, "refuted")])
def test_equal_features_that_went_through_rounding_refute_only_if_the_inputs_are_equal(known, verdict):
    features = torch.randn(10, 12, dtype=torch.float64)
    features[7] = features[2]
    asked = []
    same_inputs = None if known is None else lambda i, j: asked.append((i, j)) or known
    certificate = certify_expressivity(features, feature_error=1e-12, same_inputs=same_inputs)
    assert certificate.verdict == verdict
    assert certificate.rank_lower == 9
    assert "samples 2 and 7" in certificate.reason
    assert asked == ([] if known is None else [(2, 7)])


def test_equal_inputs_in_batches_of_other_sizes_are_refuted_though_their_features_differ_in_the_last_bit():
    features = torch.randn(10, 12, dtype=torch.float64)
    features[7] = features[2] * (1 + 2**-52)
    certificate = certify_expressivity(features, feature_error=1e-12, same_inputs=lambda i, j: True)
    assert certificate.verdict == "refuted"
    assert "samples 2 and 7 are equal" in certificate.reason


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 1e-8, 3e-10])
def test_the_residual_of_a_nearly_dependent_head_is_bounded_closely_from_below(smallest):
    """A unit that is almost dead: its column counts in exact arithmetic, however small it is; the residual in forty digits."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    features[:, 3] *= smallest
    targets = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    found = certify_expressivity(features, method="alignment", targets=targets).residual
    with mpmath.workdps(40):
        a, y = mpmath.matrix(with_ones(features).tolist()), mpmath.matrix(targets.tolist())
        left = y - a * (mpmath.inverse(a.T * a) * (a.T * y))
        exact = mpmath.sqrt(mpmath.mnorm(left, "f") ** 2 / mpmath.mnorm(y, "f") ** 2)
    assert found.lower <= exact <= found.upper
    assert found.lower >= float(exact) * (1 - 1e-4)


def test_rounding_of_features_widens_the_lower_bound_by_its_share_of_the_smallest_singular_value():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    features[:, 3] *= 1e-4
    targets = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    error = 1e-7
    bound = certify_expressivity(features, method="alignment", targets=targets, feature_error=error).residual
    for seed in range(30):
        change = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = features + change * (error / change.norm())
        seen = certify_expressivity(other, method="alignment", targets=targets).residual
        assert bound.lower <= seen.value <= bound.upper
