"""The statements that the documentation makes about these numbers hold on a real network and real digits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_conv import certify_expressivity, find_head, kernel_spectrum, last_hidden_features, ntk_gram

SAMPLES = 60


@pytest.fixture
def digits():
    source = load_digits()
    return torch.tensor(source.data[:SAMPLES] / 16), torch.tensor(source.target[:SAMPLES])


@pytest.fixture
def network():
    layers = [nn.Linear(64, 20), nn.Softplus(100), nn.Linear(20, 66), nn.Softplus(100), nn.Linear(66, 1)]
    return nn.Sequential(*layers).double()


def test_the_expressivity_condition_is_positive_definiteness_of_the_last_layers_kernel(network, digits):
    head = find_head(network, digits[0])
    features = last_hidden_features(network, head, digits[0])
    certificate = certify_expressivity(features)
    for parameter in head.trunk_parameters(network).values():
        parameter.requires_grad_(False)
    smallest = kernel_spectrum(ntk_gram(network, digits[0])).lambda_min
    assert certificate.verdict == "certified"
    assert smallest.lower <= certificate.sigma_min.upper**2
    assert smallest.upper >= certificate.sigma_min.lower**2
    assert smallest.value == pytest.approx(certificate.sigma_min.value**2, rel=1e-6)


def test_lambda_min_is_at_least_that_of_any_layer(network, digits):
    whole = kernel_spectrum(ntk_gram(network, digits[0])).lambda_min
    for layer in network:
        if isinstance(layer, nn.Linear):
            network.requires_grad_(False)
            layer.requires_grad_(True)
            assert kernel_spectrum(ntk_gram(network, digits[0])).lambda_min.lower <= whole.upper


def test_one_gradient_gives_a_rayleigh_quotient_of_the_kernel(network, digits):
    spectrum = kernel_spectrum(ntk_gram(network, digits[0]))
    for seed in range(20):
        targets = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        loss = 0.5 * (network(digits[0])[:, 0] - targets).square().sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        ratio = float(sum(g.square().sum() for g in gradients) / loss)
        assert 2 * spectrum.lambda_min.lower <= ratio <= 2 * spectrum.lambda_max.upper


def test_with_rank_n_the_head_alone_fits_any_targets(network, digits):
    head = find_head(network, digits[0])
    features = last_hidden_features(network, head, digits[0])
    assert certify_expressivity(features).verdict == "certified"
    augmented = torch.cat([features, torch.ones(SAMPLES, 1, dtype=torch.float64)], 1)
    targets = torch.randn(SAMPLES, 3, dtype=torch.float64)
    weights = torch.linalg.lstsq(augmented, targets, driver="gelsd").solution
    assert float((augmented @ weights - targets).norm() / targets.norm()) < 1e-8


def test_gradient_descent_on_the_head_obeys_the_bound_for_convex_problems(network, digits):
    """L(t) - L* <= L_H R^2 / (2 t) with eta = 1 / L_H, L_H = (2/n) sigma_max([h, 1])^2 for the mean squared error."""
    head = find_head(network, digits[0])
    features = last_hidden_features(network, head, digits[0])
    augmented = torch.cat([features, torch.ones(SAMPLES, 1, dtype=torch.float64)], 1)
    targets = digits[1].double()[:, None]
    solution = torch.linalg.lstsq(augmented, targets, driver="gelsd").solution
    weights = torch.zeros_like(solution)
    smoothness = 2 / SAMPLES * certify_expressivity(features).sigma_max.upper ** 2
    distance = float((weights - solution).square().sum())
    for step in range(1, 2001):
        weights -= 2 / SAMPLES / smoothness * augmented.T @ (augmented @ weights - targets)
        loss = float((augmented @ weights - targets).square().mean())
        assert loss <= smoothness * distance / (2 * step)


def test_lambda_min_of_a_probe_is_an_upper_bound_of_the_whole_sets(network, digits):
    whole = kernel_spectrum(ntk_gram(network, digits[0])).lambda_min
    for size in (10, 30, 59):
        part = kernel_spectrum(ntk_gram(network, digits[0][:size])).lambda_min
        assert part.upper >= whole.lower
