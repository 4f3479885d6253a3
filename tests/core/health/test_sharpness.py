"""The sharpness is the largest eigenvalue of the Gauss-Newton matrix in the coordinates of the steps, written down whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from lightning_conv import NTKOperator
from lightning_conv.health.step.optimizer_rules import step_sizes
from lightning_conv.health.step.sharpness import sharpness

X = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
CLASSES, VALUES = torch.arange(12) % 3, torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
LOSSES = {"squared": lambda u: F.mse_loss(u, VALUES.to(u)), "cross-entropy": lambda u: F.cross_entropy(u, CLASSES)}
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
}
NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    "wide": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3)),
    "deep": lambda: nn.Sequential(
        nn.Flatten(), *(m for _ in range(4) for m in (nn.LazyLinear(10), nn.Tanh())), nn.LazyLinear(3)
    ),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)),
    "normalised": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ),
    "transformer": lambda: nn.Sequential(
        nn.Flatten(1, 2),
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(36, 3),
    ),
}


def curvature(loss, outputs):
    def product(v):
        u = outputs.detach().to(v).requires_grad_()
        (slope,) = torch.autograd.grad(loss(u), u, create_graph=True)
        return torch.autograd.grad((slope * v).sum(), u)[0]

    return product


def trained(name, loss, kind):
    torch.manual_seed(3)
    network = NETWORKS[name]()
    network(X)
    network.double()
    optimizer = OPTIMIZERS[kind](network.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        LOSSES[loss](network(X.double())).backward()
        optimizer.step()
    return network, optimizer


def whole(network, loss, sizes, decay):
    """Return D^(1/2) (J^T S J + W) D^(1/2) entry by entry."""
    names = [name for name, _ in network.named_parameters()]
    outputs = network(X.double())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, list(network.parameters()), retain_graph=True)])
        for one in outputs.flatten()
    ]
    j = torch.stack(rows)
    s = torch.autograd.functional.hessian(lambda u: loss(u.reshape(12, 3)), outputs.detach().flatten())
    parameters = dict(network.named_parameters())
    root = torch.cat([sizes[name].double().sqrt().expand(parameters[name].shape).flatten() for name in names])
    w = torch.cat([torch.full((parameters[name].numel(),), decay[name], dtype=torch.float64) for name in names])
    return root[:, None] * (j.T @ s @ j + torch.diag(w)) * root


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_largest_eigenvalue_of_the_whole_matrix(name, loss, kind):
    network, optimizer = trained(name, loss, kind)
    found = step_sizes(optimizer, dict(network.named_parameters()))
    sizes = {each: found.relative(each) for each in found.rules}
    operator = NTKOperator(network, X.double())
    bent = curvature(LOSSES[loss], network(X.double()))
    measured = sharpness(operator, bent, sizes, decay=found.decay)
    right = float(torch.linalg.eigvalsh(whole(network, LOSSES[loss], sizes, found.decay))[-1])
    assert measured.value <= right * (1 + 1e-9)
    assert measured.value == pytest.approx(right, rel=0.02)
    assert measured.products <= 20
    again = sharpness(operator, bent, sizes, decay=found.decay, start=measured.vector, products=4)
    assert measured.value * (1 - 1e-9) <= again.value <= right * (1 + 1e-9)


def test_weights_that_do_not_move_do_not_count():
    network, _ = trained("wide", "squared", "sgd")
    operator = NTKOperator(network, X.double())
    bent = curvature(LOSSES["squared"], network(X.double()))
    last = {"3.weight": torch.tensor(0.1), "3.bias": torch.tensor(0.1)}
    alone = NTKOperator(network, X.double(), parameters="3.*")
    assert sharpness(operator, bent, last, products=40, tolerance=1e-6).value == pytest.approx(
        sharpness(alone, bent, last, products=40, tolerance=1e-6).value, rel=1e-4
    )


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.NAdam, optim.RMSprop, optim.Adagrad])
def test_weights_that_no_gradient_has_reached_do_not_count(kind):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    optimizer = kind(network.parameters(), lr=0.01)
    seen, tokens = torch.randint(10, (12, 2)), torch.randint(20, (12, 2))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(seen), CLASSES).backward()
        optimizer.step()
    found = step_sizes(optimizer, dict(network.named_parameters()))
    used = torch.zeros(20, dtype=torch.bool)
    used[seen.unique()] = True
    assert torch.equal((found.scales["0.weight"] > 0).all(1), used)
    assert torch.equal((found.scales["0.weight"] > 0).any(1), used)
    sizes = {each: found.relative(each) for each in found.rules}
    bent = curvature(LOSSES["cross-entropy"], network(tokens))
    measured = sharpness(NTKOperator(network, tokens), bent, sizes, decay=found.decay)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(one, list(network.parameters()), retain_graph=True)])
            for one in network(tokens).flatten()
        ]
    )
    curved = torch.autograd.functional.hessian(
        lambda u: LOSSES["cross-entropy"](u.reshape(12, 3)), network(tokens).detach().flatten()
    )
    root = torch.cat([sizes[name].sqrt().flatten() for name, _ in network.named_parameters()])
    right = float(torch.linalg.eigvalsh(root[:, None] * (rows.T @ curved @ rows) * root)[-1])
    assert measured.value == pytest.approx(right, rel=0.02)
    assert right < 100  # 1e5 and more with the rows that were not seen


def test_what_does_not_fit_is_refused():
    operator = NTKOperator(nn.Linear(2, 1), torch.randn(3, 2))
    size = torch.tensor(0.1)
    with pytest.raises(ValueError, match="none of them is a weight"):
        sharpness(operator, lambda v: v, {"other": size})
    with pytest.raises(ValueError, match="start: 5 numbers for 3 weights"):
        sharpness(operator, lambda v: v, {"weight": size}, start=torch.ones(5))
    with pytest.raises(ValueError, match='need outputs="full"'):
        sharpness(NTKOperator(nn.Linear(2, 1), torch.randn(3, 2), outputs="sum"), lambda v: v, {"weight": size})
