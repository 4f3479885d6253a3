"""The curvature of a loss in the outputs, and whether it is a sum over the samples, against second derivatives entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_conv.losses.of_outputs import evaluate, settings
from lightning_conv.losses.separation import EXACT_UP_TO, common_factor, curvature_product, is_same, separation

N, C = 6, 3
LABELS = torch.arange(N) % C
TARGETS = torch.randn(N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
U = torch.randn(N, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def focal(u):
    each = F.cross_entropy(u, LABELS, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


SEPARATE = {
    "cross-entropy": lambda u: F.cross_entropy(u, LABELS),
    "focal": focal,
    "squares, summed": lambda u: (u - TARGETS.to(u)).square().sum(),
    "absolute": lambda u: (u - TARGETS.to(u)).abs().mean(),
    "weighted samples": lambda u: (F.cross_entropy(u, LABELS, reduction="none") * torch.arange(1.0, N + 1)).mean(),
    "labels left out": lambda u: F.cross_entropy(u, torch.where(LABELS == 2, -100, LABELS)),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_the_curvature_is_the_hessian_entry_by_entry(name):
    loss = SEPARATE[name]
    eye = torch.eye(N * C, dtype=torch.float64).reshape(-1, N, C)
    found = curvature_product(loss, U, eye).reshape(N * C, N * C)
    expected = torch.zeros(N * C, N * C, dtype=torch.float64)
    for i in range(N * C):  # one derivative of one entry of the gradient at a time
        u = U.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(u), u, create_graph=True)
        entry = slope.flatten()[i]
        if entry.requires_grad:
            (row,) = torch.autograd.grad(entry, u, allow_unused=True)
            expected[i] = 0 if row is None else row.flatten()
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(curvature_product(loss, U, eye[4]).flatten(), expected[4], atol=1e-12)


def test_the_curvature_of_cross_entropy_is_that_of_its_formula():
    v = torch.randn(N, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = U.softmax(1)
    by_hand = (p * v - p * (p * v).sum(1, keepdim=True)) / N
    assert torch.allclose(curvature_product(SEPARATE["cross-entropy"], U, v), by_hand, atol=1e-14)


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("wide", [False, True])
def test_a_sum_over_samples_is_one(name, wide):
    loss = SEPARATE[name]
    u = U.float()
    if wide:  # more numbers than are looked at one by one
        u = torch.randn(N, EXACT_UP_TO, generator=torch.Generator().manual_seed(4))

        def loss(x, narrow=SEPARATE[name]):
            return narrow(x[:, :C]) + x[:, C:].square().sum()

    found = separation(loss, [each for each in settings(loss, u) if each.finite])
    assert (found.reason, found.exact) == ("", not wide)


def contrastive(u):
    z = F.normalize(u)
    return F.cross_entropy(z @ z.T / 0.2, torch.arange(len(u)).roll(1))


COUPLED = {
    "contrastive": contrastive,
    "centred": lambda u: (u - u.mean(0) - TARGETS.to(u)).square().mean(),
    "the hardest two": lambda u: (u - TARGETS.to(u)).square().mean(1).topk(2).values.mean(),
    "a root of the mean": lambda u: (u - TARGETS.to(u)).square().mean().sqrt(),
    "a cap on the mean": lambda u: F.cross_entropy(u, LABELS).clamp(max=2.0),
    "a floor under the mean": lambda u: (F.cross_entropy(u, LABELS) - 0.3).abs() + 0.3,
    "one weak pair": lambda u: F.cross_entropy(u, LABELS) + 1e-3 * u[1, 0] * u[4, 2],
}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_couple_are_found(name):
    points = [each for each in settings(COUPLED[name], U.float()) if each.finite]
    assert "couples the samples" in separation(COUPLED[name], points).reason


@pytest.mark.parametrize("pair", [(0, 1), (0, 5), (2, 3), (4, 5), (1, 4)])
def test_random_directions_find_any_single_pair(pair):
    i, j = pair
    u = torch.randn(N, EXACT_UP_TO, generator=torch.Generator().manual_seed(4))

    def loss(x):
        return x.square().mean() + 1e-3 * x[i, 0] * x[j, 7]

    found = separation(loss, [evaluate(loss, u)])
    assert not found.exact
    assert "couples the samples" in found.reason


def test_the_factor_between_batches_is_found_only_where_there_is_one():
    s = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    assert common_factor(1.5 * s, s) == pytest.approx(1.5)
    assert common_factor(torch.cat([s[:2], 1.01 * s[2:]]), s) is None
    assert common_factor(-s, s) is None
    assert common_factor(s, torch.zeros_like(s)) is None


def test_a_loss_that_is_another_one_is_not_the_same():
    loss = SEPARATE["cross-entropy"]
    then = evaluate(loss, U.float())
    assert is_same(evaluate(loss, U.float()), then)
    assert not is_same(evaluate(lambda u: 1.0001 * loss(u), U.float()), then)
    assert not is_same(evaluate(lambda u: loss(u) + (r := u.square().mean()) - r.detach(), U.float()), then)
