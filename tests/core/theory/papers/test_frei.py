"""Near-orthogonality, ranks and margins against double loops and singular values."""

import math

import pytest
import torch

from lightning_conv.theory.networks import LeakyTwoLayer
from lightning_conv.theory.papers.frei import (
    linear_agreement,
    margins,
    near_orthogonality,
    patterns_settle,
    stable_rank_bound,
)
from lightning_conv.theory.tools.matrix_norms import (
    SMALL,
    distances,
    effective_rank,
    numerical_rank,
    spectral_norm,
    stable_rank,
)


def double_loop(x):
    n = len(x)
    products = {(j, i): abs(float(x[i] @ x[j])) for i in range(n) for j in range(i)}
    pair = max(products, key=products.get)
    return min(float(row @ row) for row in x) / (n * products[pair]), pair


@pytest.mark.parametrize("block", [3, 100])
def test_kappa_is_that_of_a_double_loop(block):
    x = torch.randn(11, 30, dtype=torch.float64)
    found = near_orthogonality(x, block=block)
    kappa, pair = double_loop(x)
    assert found.kappa.lower <= kappa <= found.kappa.upper <= found.kappa.lower * (1 + 1e-10)
    assert found.kappa.value == pytest.approx(kappa, rel=1e-13)
    assert found.pair == pair
    assert (found.smallest, found.largest) == (
        pytest.approx(float(x.norm(dim=1).min())), pytest.approx(float(x.norm(dim=1).max())),
    )  # fmt: skip


def test_orthogonal_data_satisfy_every_condition_and_parallel_ones_none():
    orthogonal = near_orthogonality(torch.eye(6))
    assert math.isinf(orthogonal.kappa.value)
    assert [c.verdict for c in orthogonal.criteria(0.5)] == ["certified", "certified"]
    parallel = near_orthogonality(torch.ones(6, 3))
    assert [c.verdict for c in parallel.criteria(0.5)] == ["refuted", "refuted"]
    assert len(parallel.criteria(0.0)) == 1  # Frei et al. say nothing about the ReLU
    with pytest.raises(ValueError, match="two or more samples"):
        near_orthogonality(torch.ones(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        near_orthogonality(torch.full((2, 2), math.nan))


def test_freis_condition_is_the_papers_inequality():
    x = torch.randn(4, 400, dtype=torch.float64)
    x[0] *= 1.5
    found = near_orthogonality(x)
    norms = x.norm(dim=1)
    largest = max(abs(float(x[i] @ x[j])) for i in range(4) for j in range(i))
    for slope in (0.95, 0.5, 0.1):
        holds = float(norms.min()) ** 2 >= 3 / slope**3 * float(norms.max() / norms.min()) ** 2 * 4 * largest
        assert found.criteria(slope)[1].verdict == ("certified" if holds else "refuted")


@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (200, 130), (130, 200), (270, 400), (400, 270)])
def test_the_spectral_norm_is_the_largest_singular_value(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    exact = float(torch.linalg.svdvals(matrix)[0])
    found = spectral_norm(matrix)
    assert found.lower <= exact <= found.upper * (1 + 1e-12)
    assert found.value == pytest.approx(exact, rel=1e-5)
    if min(shape) <= SMALL:
        assert found.upper / found.lower - 1 < 1e-10
    assert spectral_norm(1e-200 * matrix).value == pytest.approx(1e-200 * exact, rel=1e-5)
    assert stable_rank(matrix).value == pytest.approx(float(matrix.square().sum()) / exact**2, rel=1e-4)


def test_ranks_of_matrices_with_known_singular_values(with_spectrum):
    values = torch.cat([torch.full((3,), 2.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)])
    matrix = with_spectrum(values)
    assert stable_rank(matrix).value == pytest.approx(3, rel=1e-10)
    assert numerical_rank(matrix) == 3
    assert effective_rank(matrix) == pytest.approx(3, rel=1e-10)
    faint = with_spectrum(torch.tensor([1.0, 2e-3, 5e-4], dtype=torch.float64))
    assert (numerical_rank(faint), numerical_rank(faint, threshold=1e-4)) == (2, 3)
    for scale in (1e-170, 1e160):  # whose squares vanish and overflow
        assert stable_rank(scale * matrix).value == pytest.approx(3, rel=1e-10)
    zero = torch.zeros(4, 4)
    assert (stable_rank(zero).value, numerical_rank(zero), effective_rank(zero)) == (0.0, 0, 0.0)
    with pytest.raises(ValueError, match="threshold: 2"):
        numerical_rank(matrix, threshold=2)
    with pytest.raises(ValueError, match="matrix: shape"):
        stable_rank(torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        stable_rank(torch.full((2, 2), math.nan))


def test_distances_are_told_matrix_by_matrix():
    then = {"w": torch.randn(9, 6), "conv": torch.randn(4, 3, 2, 2), "b": torch.randn(9)}
    now = {name: value + torch.randn_like(value) for name, value in then.items()}
    found = {d.name: d for d in distances(now, then)}
    assert set(found) == {"w", "conv"}
    for name, d in found.items():
        before, moved = then[name].double().flatten(1), (now[name].double() - then[name].double()).flatten(1)
        top, start = (float(torch.linalg.svdvals(m)[0]) for m in (moved, before))
        assert (d.spectral.value, d.relative_spectral) == (pytest.approx(top), pytest.approx(top / start))
        assert d.relative_frobenius == pytest.approx(float(moved.norm() / before.norm()))
    with pytest.raises(ValueError, match="nothing under 'w'"):
        distances({}, {"w": then["w"]})


def test_margins_and_their_spread():
    found = margins(torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([1.0, -1.0, 1.0]), norm=2.0)
    assert (found.smallest, found.largest, found.spread) == (0.25, 1.0, 0.25)
    assert margins(torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])).spread == -1.0
    with pytest.raises(ValueError, match="need -1 or 1"):
        margins(torch.ones(2), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("smooth", [False, True])
def test_the_leaky_network_is_the_papers_formula(smooth):
    net = LeakyTwoLayer(4, 6, slope=0.3, std=1.0, smooth=smooth)
    x = torch.randn(5, 4, dtype=torch.float64)

    def phi(z):
        return 0.3 * z + 0.7 * math.log((1 + math.exp(z)) / 2) if smooth else max(0.3 * z, z)

    wanted = [sum(float(net.a[j]) * phi(float(net.weight[j] @ row)) for j in range(6)) for row in x]
    assert torch.allclose(net(x)[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)
    assert sorted(net.a.tolist()) == pytest.approx([-(6**-0.5)] * 3 + [6**-0.5] * 3)
    with pytest.raises(ValueError, match="slope: 0"):
        LeakyTwoLayer(4, 6, slope=0.0, smooth=True)


def test_the_boundary_is_linear_where_the_units_of_a_sign_agree():
    net = LeakyTwoLayer(4, 6, slope=0.3)
    one, two = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        net.hidden.weight.copy_(torch.where(net.a[:, None] > 0, one, two))
    x = torch.randn(400, 4, dtype=torch.float64)
    assert linear_agreement(net(x), x, net.linear_part()) == 1.0
    with torch.no_grad():
        net.hidden.weight.copy_(torch.randn(6, 4, dtype=torch.float64))
    assert linear_agreement(net(x), x, net.linear_part()) < 1.0


def test_no_movement_within_its_factors_exceeds_the_bound_of_the_stable_rank():
    """Random c_ij in [gamma A_i, A_i] and random signs, by singular values."""
    x, a = torch.randn(6, 9, dtype=torch.float64), torch.tensor([1.0, 1.5, 1.0, 1.2, 1.1, 1.5], dtype=torch.float64)
    bound = stable_rank_bound(x, 0.4, a)
    gram = torch.linalg.svdvals(x) ** 2
    q = 0.4 / 1.5
    assert bound == pytest.approx(float(gram[0] / gram[-1]) * (1 + q) ** 2 / (4 * q), rel=1e-6)
    largest = 0.0
    for _ in range(200):
        signs = torch.randn(1, 6, dtype=torch.float64).sign()
        corners = torch.where(torch.rand(12, 6) < 0.5, 0.4, 1.0).double() * a
        values = torch.linalg.svdvals(torch.randn(12, 1).sign().double() * corners * signs @ x)
        largest = max(largest, float(values.square().sum() / values[0] ** 2))
    assert 1 < largest <= bound


def test_the_bound_of_the_stable_rank_is_attained_by_orthonormal_inputs():
    """Every unit with two factors 1 and four 1/2, in all rotations: 9/8."""
    factors = torch.tensor([1, 1, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    movement = torch.stack([factors.roll(k) for k in range(6)])
    assert stable_rank(movement).value == pytest.approx(9 / 8)
    assert stable_rank_bound(torch.eye(6), 0.5, torch.ones(6)) == pytest.approx(9 / 8)
    assert stable_rank_bound(torch.ones(2, 3), 0.5, torch.ones(2)) == math.inf
    assert stable_rank_bound(torch.eye(6), 0.0, torch.ones(6)) == math.inf


def test_patterns_settle_when_the_movement_outweighs_start_and_neighbours():
    """The worst movement that the factors allow, written out for a pair of inputs."""
    x = torch.tensor([[1.0, 0.05, 0.0], [0.05, 1.0, 0.0]], dtype=torch.float64)
    near, a = near_orthogonality(x), torch.tensor([1.0, 2.0], dtype=torch.float64)
    product, square = float(x[0] @ x[1]), float(x[0] @ x[0])
    worst = 0.3 * (0.5 * 1.0 * square - 2 * 2.0 * product)  # n max A |x_i . x_k| for the sum over the others
    assert patterns_settle(near, 0.5, a, 0.3, worst - 1e-6)
    assert not patterns_settle(near, 0.5, a, 0.3, worst + 1e-6)
    assert not patterns_settle(near, 0.0, a, 0.3, 0.0)


@pytest.mark.parametrize("size", [1e-200, 1e-170, 1e170, 1e200])
def test_the_spectral_norm_of_tiny_and_huge_entries_neither_vanishes_nor_overflows(size):
    found = spectral_norm(size * torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double())
    assert found.lower <= 4 * size * (1 + 1e-12)
    assert found.upper >= 4 * size * (1 - 1e-12)
    assert found.value == pytest.approx(4 * size, rel=1e-12)
    assert not found.certified
