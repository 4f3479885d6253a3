"""The closest pair against all pairs, and the existence proof that uses it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lightning_conv import certify_expressivity
from lightning_conv.expressivity import closest_rows


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_pairs(matrix):
    distances = torch.cdist(matrix, matrix, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    return float(distances.min())


@pytest.mark.slow
@given(
    n=st.integers(2, 60),
    d=st.integers(1, 8),
    block=st.integers(1, 70),
    seed=st.integers(0, 1000),
    offset=st.sampled_from([0, 1e6]),
)
@settings(max_examples=80, deadline=None)
def test_agrees_with_all_pairs(n, d, block, seed, offset):
    matrix = rand(n, d, seed=seed) + offset
    found = closest_rows(matrix, block=block)
    expected = all_pairs(matrix)
    assert found.distance.lower <= expected <= found.distance.upper
    assert float((matrix[found.first] - matrix[found.second]).norm()) == pytest.approx(expected, rel=1e-12)
    assert found.first < found.second
    assert 0 < found.compared <= 1


@given(n=st.integers(3, 50), block=st.integers(1, 60), seed=st.integers(0, 1000), classes=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_with_labels_only_pairs_of_different_ones_count(n, block, seed, classes):
    matrix = rand(n, 2, seed=seed)
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, 1])
    found = closest_rows(matrix, labels=labels, block=block)
    distances = torch.cdist(matrix, matrix, compute_mode="donot_use_mm_for_euclid_dist")
    expected = float(distances[labels[:, None] != labels].min())
    assert found.distance.lower <= expected <= found.distance.upper
    assert labels[found.first] != labels[found.second]


@pytest.mark.parametrize("distance", [0.0, 1e-14, 1e-9, 1e-3])
def test_a_planted_pair_is_found(distance):
    matrix = rand(500, 20)
    matrix[371] = matrix[12] + distance * torch.nn.functional.normalize(rand(20, seed=7), dim=0)
    found = closest_rows(matrix, block=64)
    assert (found.first, found.second) == (12, 371)
    assert found.distance.value == float((matrix[12] - matrix[371]).norm())
    assert found.distance.certified


@pytest.mark.parametrize("scale", [1e-200, 1e-300, 1e150])
def test_squares_that_underflow_or_overflow_make_no_rows_equal(scale):
    matrix = rand(30, 5)
    found, scaled = closest_rows(matrix, block=8), closest_rows(matrix * scale, block=8)
    assert (scaled.first, scaled.second) == (found.first, found.second)
    assert scaled.distance.lower / scale <= found.distance.value <= scaled.distance.upper / scale
    matrix[7] = matrix[3]
    assert closest_rows(matrix * scale).distance.upper == 0


def test_all_rows_equal_and_constant_columns():
    assert closest_rows(torch.ones(300, 4, dtype=torch.float64)).distance.value == 0
    line = torch.arange(100, dtype=torch.float64)[:, None].expand(-1, 3)
    assert closest_rows(line, block=8).distance.value == pytest.approx(3**0.5)


def test_far_blocks_are_not_looked_at():
    matrix = rand(2000, 3) * torch.tensor([100.0, 1.0, 1.0])
    found = closest_rows(matrix, block=50)
    assert found.distance.lower <= all_pairs(matrix) <= found.distance.upper
    assert found.compared < 0.2


@pytest.mark.parametrize(
    "matrix", [torch.ones(1, 3, dtype=torch.float64), torch.ones(5, 3), torch.ones(5, dtype=torch.float64)]
)
def test_what_has_no_pairs_is_refused(matrix):
    with pytest.raises(ValueError, match="matrix"):
        closest_rows(matrix)


# --- distinct -------------------------------------------------------------------------------------------------------


def digits(n):
    return torch.from_numpy(load_digits().data[:n] / 16)


def test_distinct_digits_are_certified_and_random_wide_layers_bear_it_out():
    inputs = digits(200)
    certificate = certify_expressivity(inputs.new_zeros(200, 220), method="distinct", entering=inputs)
    assert (certificate.verdict, certificate.rank_lower, certificate.method) == ("certified", 200, "distinct")
    assert certificate.distance.lower > 0
    for seed in range(5):
        torch.manual_seed(seed)
        layer = nn.Linear(64, 220).double()
        features = torch.nn.functional.softplus(layer(inputs), beta=100).detach()
        assert certify_expressivity(features).verdict == "certified"


@pytest.mark.parametrize(
    ("bias", "width", "verdict"), [(True, 199, "certified"), (True, 198, "refuted"), (False, 199, "refuted")]
)
def test_the_layer_must_be_wide_enough(bias, width, verdict):
    inputs = digits(200)
    found = certify_expressivity(inputs.new_zeros(200, width), method="distinct", entering=inputs, bias=bias)
    assert found.verdict == verdict


def test_equal_inputs_are_refuted_by_name_and_rounded_ones_left_open():
    inputs = digits(50).clone()
    inputs[31] = inputs[8]
    features = inputs.new_zeros(50, 60)
    refuted = certify_expressivity(features, method="distinct", entering=inputs)
    assert refuted.verdict == "refuted"
    assert "samples 8 and 31" in refuted.reason
    assert certify_expressivity(features, method="distinct", entering=inputs, feature_error=1e-9).verdict == "undecided"
    inputs[31, 0] += 1e-6
    assert certify_expressivity(features, method="distinct", entering=inputs, feature_error=1e-9).verdict == "certified"
    assert certify_expressivity(features, method="distinct", entering=inputs, feature_error=1e-6).verdict == "undecided"


def test_one_sample_is_distinct():
    inputs = rand(1, 3)
    assert certify_expressivity(inputs.new_zeros(1, 4), method="distinct", entering=inputs).verdict == "certified"


def test_polynomial_activations_show_why_the_theorem_asks():
    """h = (w x + b)^2 spans at most the quadratic forms: rank 6 in two dimensions, however wide the layer."""
    inputs = rand(12, 2)
    torch.manual_seed(0)
    features = nn.Linear(2, 40).double()(inputs).square().detach()
    assert certify_expressivity(features).rank_lower == 6


# --- alignment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [False, True])
def test_the_residual_is_that_of_least_squares(bias, classes):
    features = rand(60, 10)
    targets = torch.arange(60) % 3 if classes else rand(60, 2, seed=4)
    found = certify_expressivity(features, targets=targets, bias=bias)
    rows = torch.nn.functional.one_hot(targets).double() if classes else targets
    a = torch.cat([features, torch.ones(60, 1)], 1) if bias else features
    projector = a @ torch.linalg.pinv(a)
    expected = float((rows - projector @ rows).norm() / rows.norm())
    assert found.method == "alignment"
    assert found.verdict == "refuted"
    assert found.residual.lower <= expected <= found.residual.upper
    assert found.residual.upper - found.residual.lower < 1e-9


def test_targets_within_reach_are_certified():
    features = rand(60, 10)
    targets = features @ rand(10, 3, seed=2) + 0.7
    found = certify_expressivity(features, targets=targets)
    assert found.verdict == "certified"
    assert found.residual.upper < 1e-12
    assert certify_expressivity(features, targets=targets, bias=False).verdict == "refuted"


def test_rounding_inside_the_trunk_widens_both_bounds():
    features, targets = rand(60, 10), rand(60, 2, seed=4)
    sharp, wide = (certify_expressivity(features, targets=targets, feature_error=e).residual for e in (0.0, 1e-3))
    assert wide.lower < sharp.lower <= sharp.upper < wide.upper
    assert not wide.certified
    for seed in range(10):
        moved = features + 1e-3 * torch.nn.functional.normalize(rand(60, 10, seed=seed).flatten(), dim=0).view(60, 10)
        found = certify_expressivity(moved, targets=targets).residual
        assert wide.lower <= found.value <= wide.upper


def test_linearly_dependent_features_leave_the_lower_bound_open():
    features = rand(60, 10)
    features[:, 3] = features[:, 4]
    found = certify_expressivity(features, targets=rand(60, 2, seed=4))
    assert found.residual.lower == 0
    assert found.verdict == "undecided"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "method: 'guess'"),
        ({"method": "distinct"}, "entering: None"),
        ({"method": "distinct", "entering": torch.zeros(20, 3)}, r"entering: torch.float32 of shape \(20, 3\)"),
        ({"method": "distinct", "entering": torch.zeros(19, 3).double()}, "a row for each of 20 samples"),
        ({"method": "alignment"}, "targets: None"),
        ({"method": "alignment", "targets": torch.zeros(3)}, "targets: 3 for 20 samples"),
        ({"method": "alignment", "targets": torch.zeros(20)}, "all zero"),
        ({"method": "alignment", "targets": torch.full((20,), math.nan)}, "NaN"),
    ],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        certify_expressivity(rand(20, 8), **options)
