"""The bias-generalised NTK: probabilities against scipy's multivariate normal and Monte Carlo, the kernel against wide networks."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from lightning_conv import ntk_gram
from lightning_conv.theory.networks import BiasedTwoLayer
from lightning_conv.theory.papers.bias_ntk import (
    active_probability,
    bias_ntk,
    starts_sparse,
    stays_sparse,
)
from lightning_conv.theory.tools.activations import activation_patterns


def unit(n, d, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def both_active(rho, threshold):
    """P(u >= B, v >= B), read from the kernel: its two forms differ by exactly this probability."""
    x = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
    with_bias, without = (bias_ntk(x, threshold, trained_bias=trained) for trained in (True, False))
    return float((with_bias - without)[0, 1])


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 2.0])
@pytest.mark.parametrize("rho", [-0.9, -0.3, 0.0, 0.5, 0.99])
def test_both_active_is_the_orthant_probability(threshold, rho):
    def integrand(u):
        return norm.pdf(u) * norm.cdf((rho * u - threshold) / math.sqrt(1 - rho**2))

    wanted, error = quad(integrand, threshold, 12, epsabs=1e-14, epsrel=1e-13, limit=400)
    assert error < 1e-11
    assert both_active(rho, threshold) == pytest.approx(wanted, abs=1e-11)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.3])
def test_equal_and_opposite_inputs_are_the_limits(threshold):
    ends = [both_active(rho, threshold) for rho in (1.0, -1.0, 0.0)]
    q = norm.sf(threshold)
    assert ends[0] == pytest.approx(q, rel=1e-12)
    assert ends[1] == pytest.approx(max(0.0, 2 * q - 1), abs=1e-15)
    assert ends[2] == pytest.approx(q**2, rel=1e-10)
    assert active_probability(threshold) == pytest.approx(q, rel=1e-14)


def test_at_zero_threshold_the_kernel_is_the_arc_cosine_one():
    x = unit(6, 4)
    cosine = (x @ x.T).clamp(-1, 1)
    wanted = (cosine + 1) * (math.pi - torch.arccos(cosine)) / (2 * math.pi)
    assert torch.allclose(bias_ntk(x, 0.0), wanted, atol=1e-8)  # arccos loses half the digits at 1
    assert torch.allclose(bias_ntk(x, 0.0, trained_bias=False), cosine * wanted / (cosine + 1), atol=1e-8)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_kernel_is_the_mean_over_random_units(threshold):
    x, draws = unit(5, 3), 400_000
    active = (x @ torch.randn(3, draws, dtype=torch.float64) >= threshold).double()
    size, wanted = x @ x.T + 1, bias_ntk(x, threshold)
    p = wanted / size
    deviation = (size * (active @ active.T / draws) - wanted).abs()
    assert bool((deviation <= size * (5 * (p * (1 - p) / draws).sqrt() + 20 / draws)).all())


def test_nearly_equal_inputs_keep_their_digits():
    """P = Q - phi(B) sqrt(2 (1 - rho)) / sqrt(2 pi) + ...: a square root at rho = 1, with rho known to 1e-16 only."""
    x = unit(1, 8).repeat(2, 1)
    gap = 1e-7
    x[1] += gap * torch.nn.functional.normalize(unit(1, 8, 1)[0] - (unit(1, 8, 1)[0] @ x[0]) * x[0], dim=0)
    x[1] /= x[1].norm()
    kernel = bias_ntk(x, 1.0)
    first_order = 2 * (norm.sf(1.0) - math.exp(-0.5) / (2 * math.pi) * gap)
    assert float(kernel[0, 1]) == pytest.approx(first_order, rel=1e-13)


def test_the_kernel_of_a_wide_network_tends_to_it():
    x, width = unit(6, 5), 20_000
    net = BiasedTwoLayer(5, width, 0.8)
    gram = ntk_gram(net, x).matrix
    wanted = bias_ntk(x, 0.8)
    p = wanted / (x @ x.T + 1)
    assert bool(((gram - wanted).abs() <= 5.5 * (x @ x.T + 1) * (p * (1 - p) / width).sqrt() + 1e-3).all())
    share = activation_patterns(net, x).layers[0].active_fraction
    q = norm.sf(0.8)
    assert float((share - q).abs().max()) <= 5 * math.sqrt(q * (1 - q) / width)


def test_the_network_is_the_papers_formula():
    net = BiasedTwoLayer(3, 50, 0.4)
    x = unit(4, 3)
    w, b, a = net.hidden.weight, -net.hidden.bias, net.a
    assert bool((b == 0.4).all())
    wanted = sum(a[r] * torch.relu(x @ w[r] - b[r]) for r in range(50)) / math.sqrt(50)
    assert torch.allclose(net(x)[:, 0], wanted, rtol=1e-12)
    assert set(net.a.tolist()) == {-1.0, 1.0}
    assert torch.equal(BiasedTwoLayer(3, 50, 2.0).hidden.weight, w)


@pytest.mark.parametrize(("share", "verdict"), [(0.1, "consistent"), (0.7, "refuted"), (math.nan, "undecided")])
def test_sparsity_is_judged_in_both_directions(share, verdict):
    assert stays_sparse(share, 1.0, when="at step 3").verdict == verdict


def test_what_is_no_unit_vector_is_refused():
    with pytest.raises(ValueError, match="scale each to norm 1"):
        bias_ntk(2 * torch.eye(3), 0.0)
    with pytest.raises(ValueError, match="threshold: -1"):
        stays_sparse(0.1, -1.0)


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_the_share_at_the_start_stays_within_its_bound_as_often_as_is_said(threshold):
    """At a failure probability of 5 % fewer than that of many draws may be outside, and the bound is of the right size."""
    torch.manual_seed(0)
    width, x = 100, torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64))
    z = torch.randn(4000, width, 4, dtype=torch.float64) @ x.T
    shares = (z > threshold).double().mean((1, 2)).tolist()
    found = [starts_sparse(share, threshold, width, failure=0.05) for share in shares]
    outside = sum(each.verdict == "refuted" for each in found) / len(found)
    assert outside < 0.05
    p = active_probability(threshold)
    assert found[0].bound == pytest.approx(_bernstein(p, width, 0.05), rel=1e-6)
    # One input is the worst case; there the bound is at most twice the quantile that the central limit theorem has.
    assert found[0].bound < 2 * 1.96 * math.sqrt(p * (1 - p) / width) + 2.5 / width
    assert starts_sparse(p, threshold, width).measured == 0


def _bernstein(p: float, width: int, failure: float) -> float:
    """The t at which 2 exp(-m t^2 / (2 p (1 - p) + 2 t / 3)) is the failure probability, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(200):
        t = (low + high) / 2
        if 2 * math.exp(-width * t**2 / (2 * p * (1 - p) + 2 * t / 3)) > failure:
            low = t
        else:
            high = t
    return low
