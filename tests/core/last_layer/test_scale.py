"""Bounds of singular values and of L_H hold at every scale: features are scaled by powers of two before they are squared."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import nn

from lightning_conv import HeadProblem, head_curvature
from lightning_conv.last_layer.sigma import sigma_max, sigma_min


def problem(h, bias=False, **options):
    samples = h.shape[0] if isinstance(h, torch.Tensor) else h.samples
    return HeadProblem(h, torch.zeros(samples, 1, dtype=torch.float64), nn.MSELoss(), bias=bias, **options)


class Streamed:
    """Features that are read row by row."""

    def __init__(self, features):
        self.features, (self.samples, self.width) = features, features.shape

    def rows(self, start, stop):
        return self.features[start:stop].clone()


def exact_ends(h):
    with mpmath.workdps(60):
        values = mpmath.svd_r(mpmath.matrix(h.tolist()), compute_uv=False)
    return values[0], values[len(values) - 1]


@pytest.mark.parametrize("exponent", [-1070, -1040, -1000, -600, -300, -201, -150, 0, 150, 201, 600, 1000, 1018])
@pytest.mark.parametrize("shape", [(2, 2), (5, 3), (3, 6)])
def test_the_bounds_contain_the_exact_singular_values_at_every_scale(exponent, shape):
    torch.manual_seed(shape[0])
    half = exponent // 2
    h = torch.randn(*shape, dtype=torch.float64) * 2.0**half * 2.0 ** (exponent - half)
    largest, smallest = exact_ends(h)
    rows = problem(h)
    found = sigma_max(rows)
    assert found.certified
    assert found.lower <= largest <= found.upper
    if exponent > -1000:
        assert found.upper - found.lower <= 1e-3 * found.value
    below = sigma_min(rows)
    assert below.lower <= smallest <= below.upper
    with mpmath.workdps(60):
        square = 2 * largest**2 / len(h)
        curvature = head_curvature(rows).value
        assert curvature.lower <= square <= curvature.upper


@pytest.mark.parametrize("exponent", [-900, 0, 900])
def test_streamed_rows_are_scaled_too(exponent):
    torch.manual_seed(0)
    h = torch.randn(200, 3, dtype=torch.float64)
    rows = problem(Streamed(h * 2.0**exponent), max_memory=2000)
    assert not rows.held
    values = torch.linalg.svdvals(h)
    for found, value in ((sigma_max(rows), values[0]), (sigma_min(rows), values[-1])):
        value = float(value) * 2.0**exponent
        assert found.lower <= value * (1 + 1e-12)
        assert value * (1 - 1e-12) <= found.upper <= value * (1 + 1e-3)


def test_a_diagonal_of_1e_minus_90():
    h = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64)) * 1e-90
    assert sigma_max(problem(h)).value == pytest.approx(4e-90, rel=1e-6)


def test_tiny_features_beside_ones_and_huge_ones_that_are_refused():
    h = torch.rand(4, 3, dtype=torch.float64)
    assert sigma_max(problem(1e-170 * h, bias=True)).value == pytest.approx(2.0, rel=1e-6)
    with pytest.raises(ValueError, match=r"features: of norm up to .*; divide the features by a constant"):
        sigma_max(problem(1e160 * h, bias=True))


def test_a_step_stays_infinite_where_the_curvature_underflows():
    curvature = head_curvature(problem(torch.full((2, 2), 1e-200, dtype=torch.float64)))
    assert 0 <= curvature.value.lower <= curvature.value.upper
    assert curvature.value.upper > 0
    assert curvature.step == math.inf
