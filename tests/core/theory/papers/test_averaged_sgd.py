"""Averaged SGD: decay, degrees of freedom, averages and the symmetric network, each against an independent computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv import ntk_gram
from lightning_conv.theory.papers.averaged_sgd import (
    AveragedIterate,
    SymmetricTwoLayer,
    degrees_of_freedom,
    largest_step,
    progressive_bound,
    spectrum_decay,
)


@given(st.floats(0.5, 4), st.floats(0.01, 100))
def test_an_exact_power_law_has_its_exponent_and_no_error(beta, constant):
    values = constant * torch.arange(1, 60, dtype=torch.float64) ** -beta
    decay = spectrum_decay(values[torch.randperm(59, generator=torch.Generator().manual_seed(0))])
    assert decay.beta == pytest.approx(beta, rel=1e-9)
    assert decay.constant == pytest.approx(constant, rel=1e-9)
    assert decay.standard_error < 1e-9
    assert decay.r_squared == pytest.approx(1.0)


def test_the_standard_error_is_that_of_linear_regression():
    from scipy.stats import linregress

    noise = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.arange(1, 201, dtype=torch.float64) ** -1.7 * (0.001 * noise).exp()
    expected = linregress(np.log(np.arange(5, 151)), np.log(values.sort(descending=True).values[4:150].numpy()))
    decay = spectrum_decay(values, first=5, last=150)
    assert decay.beta == pytest.approx(-expected.slope, rel=1e-10)
    assert decay.standard_error == pytest.approx(expected.stderr, rel=1e-8)
    assert decay.r_squared == pytest.approx(expected.rvalue**2, rel=1e-8)


def test_rounding_is_left_out_and_too_little_is_refused():
    values = torch.tensor([1.0, 0.25, 1 / 9, 1 / 16, 1e-18, -1e-18])
    assert spectrum_decay(values, floor=1e-12).beta == pytest.approx(2, rel=1e-6)
    with pytest.raises(ValueError, match="need three or more of the 4 eigenvalues"):
        spectrum_decay(values, first=3, floor=1e-12)


def test_the_rate_is_the_corollarys():
    decay = spectrum_decay(torch.arange(1, 60, dtype=torch.float64) ** -2.0)
    assert decay.rate(0.5) == pytest.approx(2 / 3)
    assert decay.rate(1.0) == pytest.approx(4 / 5)
    assert decay.penalty(1000, 0.5) == pytest.approx(1000 ** (-2 / 3))
    assert math.isnan(spectrum_decay(torch.arange(1, 60, dtype=torch.float64) ** -0.5).rate())


@given(st.integers(1, 12), st.floats(1e-4, 10))
def test_degrees_of_freedom_are_the_trace_of_the_smoother(n, penalty):
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    gram = factor @ factor.T
    naive = float(torch.trace(gram @ torch.linalg.inv(gram + n * penalty * torch.eye(n, dtype=torch.float64))))
    found = degrees_of_freedom(torch.linalg.eigvalsh(gram / n), penalty)
    assert found == pytest.approx(naive, rel=1e-8)
    assert 0 <= found <= min(n, float(torch.trace(gram)) / n / penalty) * (1 + 1e-12)
    with pytest.raises(ValueError, match="penalty: 0"):
        degrees_of_freedom(torch.ones(2), 0)


def test_under_a_power_law_they_grow_as_lambda_to_minus_one_over_beta():
    """sum_i 1 / (1 + lambda i^2) -> pi / (2 sqrt lambda) - 1/2."""
    values = torch.arange(1, 2_000_001, dtype=torch.float64) ** -2.0
    for penalty in (1e-2, 1e-4):
        exact = math.pi / (2 * math.sqrt(penalty)) / math.tanh(math.pi / math.sqrt(penalty)) - 0.5
        assert degrees_of_freedom(values, penalty) == pytest.approx(exact, rel=1e-3)


def test_the_average_is_the_mean_of_all_iterates():
    network = SymmetricTwoLayer(3, 4, generator=torch.Generator().manual_seed(0))
    average, seen = AveragedIterate(network.named_parameters()), []
    for t in range(7):
        with torch.no_grad():
            network.b.add_(t)
        average.add(network.named_parameters())
        seen.append(network.b.detach().clone())
    assert average.count == 7
    assert torch.allclose(average.mean["b"], torch.stack(seen).mean(0), rtol=1e-13)


@pytest.fixture
def network() -> SymmetricTwoLayer:
    return SymmetricTwoLayer(5, 40, gamma=0.7, generator=torch.Generator().manual_seed(3))


INPUTS = torch.nn.functional.normalize(
    torch.randn(9, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
)


def test_the_symmetric_network_is_zero_at_the_start_and_its_directions_lie_on_the_sphere(network):
    assert float(network(INPUTS).detach().abs().max()) < 1e-14
    assert torch.allclose(network.b.norm(dim=1), torch.ones(40, dtype=torch.float64))
    with pytest.raises(ValueError, match="width: 3"):
        SymmetricTwoLayer(2, 3)


def test_its_kernel_is_the_ntk_also_away_from_the_start(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            )
    expected = ntk_gram(network, INPUTS, precision="certified").matrix
    assert torch.allclose(network.kernel(INPUTS), expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(network.kernel(INPUTS[:4], INPUTS), expected[:4], rtol=1e-9, atol=1e-12)


def test_a_wide_network_has_the_limit_kernel():
    """E[s(b.x) s(b.x')] + (x.x' + gamma^2) E[s'(b.x) s'(b.x')], b uniform on the sphere, by other samples of b."""
    wide = SymmetricTwoLayer(5, 40_000, gamma=0.7, generator=torch.Generator().manual_seed(6))
    b = torch.randn(400_000, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    z = INPUTS @ (b / b.norm(dim=1, keepdim=True)).T
    value, slope = z.tanh(), 1 - z.tanh().square()
    limit = (value @ value.T + (INPUTS @ INPUTS.T + 0.49) * (slope @ slope.T)) / z.shape[1]
    assert torch.allclose(wide.kernel(INPUTS), limit, rtol=0.02, atol=0.01)


def test_the_largest_step_is_that_of_the_theorem():
    assert 4 * (6 + 0.3) * largest_step(0.3) == pytest.approx(1.0)


@pytest.mark.parametrize(("step", "penalty"), [(0.05, 0.1), (0.3, 0.01)])
def test_the_progressive_loss_of_sgd_stays_below_its_bound(step, penalty):
    """SGD in feature space, written out, and the minimum over w by an independent least-squares solve."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(60, 8, generator=generator, dtype=torch.float64) / 3
    targets = features @ torch.randn(8, generator=generator, dtype=torch.float64)
    targets += 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
    w, losses = torch.zeros(8, dtype=torch.float64), []
    for phi, y in zip(features, targets, strict=True):
        error = phi @ w - y
        losses.append(float(error**2 + penalty * w @ w) / 2)
        w = w - step * (error * phi + penalty * w)
    at = [1, 2, 10, 60]
    found = progressive_bound(features @ features.T, targets, step, penalty, at)
    share = step * (float(features.square().sum(1).max()) + penalty)
    for t, bound in zip(at, found, strict=True):
        weight = math.sqrt(penalty * t + 1 / step)
        stacked = np.vstack([features[:t].numpy(), weight * np.eye(8)])
        best, *_ = np.linalg.lstsq(stacked, np.concatenate([targets[:t].numpy(), np.zeros(8)]), rcond=None)
        left = features[:t].numpy() @ best - targets[:t].numpy()
        assert bound == pytest.approx((left @ left + weight**2 * best @ best) / 2 / (1 - share), rel=1e-9)
        assert sum(losses[:t]) <= bound
    with pytest.raises(ValueError, match="the bound needs it below 1"):
        progressive_bound(features @ features.T, targets, 10.0, penalty, at)
