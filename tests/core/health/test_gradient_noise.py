"""The noise of gradients is what the gradients themselves say, and its estimates are unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.health.kernel.gradient_noise import gradient_noise, noise_scale


def draw(count, signal, noise, seed, size=50):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(size, dtype=torch.float64)
    mean[0] = signal
    return mean + noise / math.sqrt(size) * torch.randn(count, size, generator=generator, dtype=torch.float64)


@given(st.integers(2, 20), st.integers(0, 1000))
def test_it_is_computed_from_the_gradients_themselves(count, seed):
    gradients = draw(count, 1.0, 2.0, seed)
    found = gradient_noise(gradients @ gradients.T)
    assert found.variance == pytest.approx(float(gradients.var(0).sum()), rel=1e-9)
    assert found.of_probe == pytest.approx(float(gradients.mean(0).square().sum()), rel=1e-9)
    assert found.mean_square == pytest.approx(found.of_probe - found.variance / count, rel=1e-9, abs=1e-12)
    assert torch.allclose(found.norms, gradients.norm(dim=1))
    pairs = [float(gradients[i] @ gradients[j]) < 0 for i in range(count) for j in range(i)]
    assert found.conflict == pytest.approx(sum(pairs) / len(pairs))


def test_the_estimates_are_unbiased():
    found = [gradient_noise(g @ g.T) for g in (draw(8, 1.0, 3.0, seed) for seed in range(4000))]
    assert sum(each.variance for each in found) / len(found) == pytest.approx(9, rel=0.02)
    assert sum(each.mean_square for each in found) / len(found) == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize("scale", [4.0, 30.0])
def test_the_interval_holds_the_noise_scale_of_the_population(scale):
    held = 0
    for seed in range(200):
        gradients = draw(64, 1.0, math.sqrt(scale), seed)
        found = noise_scale([gradient_noise(gradients @ gradients.T)], gradients @ gradients.T)
        assert found.lower <= found.value <= found.upper
        held += found.lower <= scale <= found.upper
    assert held >= 180


def test_where_noise_prevails_there_is_no_upper_end():
    gradients = draw(16, 0.05, 10.0, 0)
    found = noise_scale([gradient_noise(gradients @ gradients.T)], gradients @ gradients.T)
    assert found.upper == math.inf
    assert found.lower > 16


def test_pooling_makes_it_finite():
    every = [draw(64, 1.0, math.sqrt(200.0), seed) for seed in range(40)]
    pooled = noise_scale([gradient_noise(g @ g.T) for g in every], every[-1] @ every[-1].T)
    assert pooled.lower < 200 < pooled.upper < math.inf


def test_ten_samples_that_carry_nearly_everything():
    gradients = torch.full((64, 1), 0.01, dtype=torch.float64)
    gradients[:10] = 1.0
    found = gradient_noise(gradients @ gradients.T)
    assert found.carriers == 10
    assert found.independent == pytest.approx(10, rel=0.02)
    assert found.conflict == 0


def test_zero_gradients_are_counted():
    found = gradient_noise(torch.zeros(4, 4))
    assert (found.zeros, found.carriers, found.independent) == (4, 0, 0.0)
    assert noise_scale([found]).value == math.inf


@pytest.mark.parametrize(
    "products", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 1), torch.full((2, 2), math.nan)]
)
def test_what_is_no_matrix_of_products_is_refused(products):
    with pytest.raises(ValueError, match="products"):
        gradient_noise(products)


@pytest.mark.parametrize("products", [None, "a", [[1.0, 0.0], [0.0, 1.0]]])
def test_products_that_are_no_tensor_are_refused(products):
    with pytest.raises(TypeError, match=r"products: .*; need the inner products of the gradients, \(n, n\)"):
        gradient_noise(products)


def test_a_noise_scale_of_nothing_or_of_other_samples_is_refused():
    found = gradient_noise(torch.eye(3))
    with pytest.raises(ValueError, match="measured: no measurement; need at least one"):
        noise_scale([])
    with pytest.raises(TypeError, match=r"measured: .*GradientNoise; need a list of what gradient_noise returns"):
        noise_scale(found)
    with pytest.raises(ValueError, match=r"products: shape \(5, 5\) for the 3 samples of the last measurement"):
        noise_scale([found], torch.eye(5))
