"""``torch.linalg.matrix_rank`` against exact arithmetic and the certificate: too small, and too large, in float32 and in float64."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sympy import QQ
from sympy.polys.matrices import DomainMatrix
from torch import nn

from lightning_conv import certify_expressivity
from lightning_conv.networks.head import find_head
from lightning_conv.networks.hidden_features import last_hidden_features
from lightning_conv.recipes import wide_fc

PRIME = 2**31 - 1


def with_ones(features):
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)


def rational_rank(rows):
    """Compute the rank over the rationals of a matrix of floats or fractions, by elimination without rounding."""
    exact = [[QQ(*Fraction(value).as_integer_ratio()) for value in row] for row in rows]
    return DomainMatrix(exact, (len(exact), len(exact[0])), QQ).rank()


def modular_rank(rows):
    """Compute the rank modulo a prime, which is at most the rational rank: a minor that is not zero there is not zero."""
    a = np.array(
        [[Fraction(v).numerator * pow(Fraction(v).denominator, -1, PRIME) % PRIME for v in row] for row in rows]
    )
    rank = 0
    for column in range(a.shape[1]):
        pivots = np.flatnonzero(a[rank:, column])
        if len(pivots) == 0:
            continue
        a[[rank, rank + pivots[0]]] = a[[rank + pivots[0], rank]]
        a[rank] = a[rank] * pow(int(a[rank, column]), -1, PRIME) % PRIME
        below = a[rank + 1 :, column].copy()
        a[rank + 1 :] = (a[rank + 1 :] - below[:, None] * a[rank] % PRIME) % PRIME
        rank += 1
        if rank == len(a):
            break
    return rank


def test_the_two_judges_agree():
    rows = (torch.randn(9, 3, dtype=torch.float64) @ torch.randint(-3, 4, (3, 12)).double()).round(decimals=2)
    exact = [[Fraction(v) for v in row] for row in rows.tolist()]
    exact[8] = [2 * a - b for a, b in zip(exact[0], exact[1], strict=True)]
    assert modular_rank(exact) == rational_rank(exact) < 9


@pytest.mark.parametrize("n", [150, 200])
def test_too_small_for_the_recipe_on_digits(n):
    """Float32 features of the recipe's network as initialised: full rank, which matrix_rank denies."""
    torch.manual_seed(0)
    inputs = torch.from_numpy(load_digits().data[:n] / 16).float()
    network = wide_fc(64, 10, width=n + n // 10)
    head = find_head(network, inputs)
    coarse, fine = (last_hidden_features(network, head, inputs, dtype=d) for d in (torch.float32, torch.float64))
    assert int(torch.linalg.matrix_rank(with_ones(coarse))) < n
    assert modular_rank(with_ones(coarse).tolist()) == n
    assert modular_rank(with_ones(fine).tolist()) == n
    certificate = certify_expressivity(coarse, recompute=lambda: fine)
    assert (certificate.verdict, certificate.rank_lower) == ("certified", n)


def test_too_large_for_a_linear_network_behind_batch_norm():
    """Five temperatures in kelvin, a linear layer, BatchNorm: rank 6 exactly; rounding errors of 300 K count as new directions."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40)).eval()
    linear, norm = network
    inputs = 300 + torch.rand(30, 5)
    with torch.no_grad():
        sums = linear(inputs)
        norm.running_mean.copy_(sums.mean(0))
        norm.running_var.copy_(sums.var(0))
    coarse, fine = network(inputs).detach(), copy.deepcopy(network).double()(inputs.double()).detach()

    def exact(tensor):
        return [[Fraction(value) for value in row] for row in tensor.tolist()]

    weights, biases, means = exact(linear.weight), *exact(torch.stack([linear.bias, norm.running_mean]).detach())
    # Without the division by the standard deviations, which are positive and do not change the rank.
    features = [
        [
            sum(w * x for w, x in zip(row, sample, strict=True)) + b - m
            for row, b, m in zip(weights, biases, means, strict=True)
        ]
        + [Fraction(1)]
        for sample in exact(inputs)
    ]
    assert rational_rank(features) == 6
    assert int(torch.linalg.matrix_rank(with_ones(coarse))) > 6
    assert int(torch.linalg.matrix_rank(with_ones(fine))) > 6
    certificate = certify_expressivity(coarse, recompute=lambda: fine)
    assert (certificate.verdict, certificate.rank_lower) == ("undecided", 6)
    assert "at least 6 of 30" in certificate.reason


def test_too_small_for_an_exactly_known_matrix():
    """A triangular integer matrix of determinant 1 whose smallest singular value is 1e-18: no float64 method proves its rank."""
    matrix = torch.eye(60, dtype=torch.float64) - torch.ones(60, 60, dtype=torch.float64).triu(1)
    assert rational_rank(matrix.tolist()) == 60
    assert int(torch.linalg.matrix_rank(matrix)) == 59
    certificate = certify_expressivity(matrix, bias=False)
    assert (certificate.verdict, certificate.rank_lower) == ("undecided", 59)  # a lower bound, and reported as one
