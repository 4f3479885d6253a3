"""The near-orthogonality of data has no scale, and its interval contains the exact ratio at every size."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lightning_conv.theory.papers.allen_zhu.separation import separation, unit_inputs
from lightning_conv.theory.papers.frei import near_orthogonality


def exact_kappa(rows):
    points = [[Fraction(x) for x in row] for row in rows.tolist()]
    n = len(points)
    products = [
        abs(sum(a * b for a, b in zip(points[i], points[j], strict=True))) for i in range(n) for j in range(n) if i != j
    ]
    squares = [sum(a * a for a in point) for point in points]
    return min(squares), n * max(products)


@pytest.mark.parametrize("size", [1e-310, 1e-170, 1e-160, 1.0, 1e160, 1e300])
def test_kappa_lies_in_its_interval_at_every_size(size):
    for seed in range(20):
        rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
        found = near_orthogonality(rows).kappa
        least, most = exact_kappa(rows)
        assert found.certified
        assert Fraction(found.lower) * most <= least <= Fraction(found.upper) * most
        assert found.upper - found.lower <= 1e-12 * found.value


def test_tiny_inputs_beside_others_are_not_certified_as_orthogonal():
    rows = torch.tensor([[1e-170, 0.0], [1e-170, 1e-170], [0.0, 1.0]], dtype=torch.float64)
    found = near_orthogonality(rows).kappa
    least, most = exact_kappa(rows)
    assert Fraction(found.lower) * most <= least
    assert found.upper == float("inf") or least <= Fraction(found.upper) * most


@pytest.mark.parametrize("seed", range(10))
def test_the_separation_lies_in_its_interval(seed):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = separation(x).delta.distance
    rows = unit_inputs(x).tolist()
    square = min(
        sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
        for i in range(5)
        for j in range(i)
    )
    assert Fraction(found.lower) ** 2 <= square <= Fraction(found.upper) ** 2
