"""Couplings that need many samples are refused, and those below sqrt(eps) leave no certificate; ordinary networks keep theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import NTKOperator, kernel_spectrum, ntk_gram
from lightning_conv.kernels import plan_ntk


class Mixing(nn.Module):
    """A linear layer, and what a function of the whole batch makes of its outputs."""

    def __init__(self, mix):
        super().__init__()
        self.layer, self.mix = nn.Linear(4, 2), mix

    def forward(self, x):
        return self.mix(self.layer(x))


ENGINES = ["auto", "jacobian"]


def gate(mix, above=16):
    return lambda u: mix(u) if len(u) > above else u


def by_blocks(size):
    return lambda u: torch.cat([c - c[-1:] * (len(c) == size) for c in u.split(size)])


MANY = {
    "the mean of more than 16": gate(lambda u: u + u.mean(0)),
    "the mean of exactly 24": lambda u: u + u.mean(0) if len(u) == 24 else u,
    "sample 20 for all": gate(lambda u: u + u[20:21] / 2, 20),
    "one pair of late samples": gate(lambda u: torch.cat([u[:21], u[21:22] + u[23:24], u[22:]]), 23),
    "blocks of 20": by_blocks(20),
    "blocks of 12": by_blocks(12),
    "even places among themselves": gate(
        lambda u: u + (u[::2].mean(0) * (torch.arange(len(u)) % 2 == 0)[:, None]).to(u)
    ),
    "only batches of at most four": lambda u: u if len(u) > 4 else u + u.mean(0),
    "a sample alone": lambda u: u if len(u) > 1 else 2 * u,
    "the number of samples": lambda u: u * (1 + len(u) / 1000),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mix", MANY)
def test_couplings_that_need_many_samples_are_refused(mix, engine):
    torch.manual_seed(0)
    model, x = Mixing(MANY[mix]).double(), torch.rand(24, 4).double()
    for precision in ("certified", "exact"):
        with pytest.raises(ValueError, match=r"samples couple|engine='jacobian'"):
            ntk_gram(model, x, precision=precision, engine=engine)


@pytest.mark.parametrize("mix", MANY)
def test_an_operator_refuses_them_too(mix):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="samples couple"):
        NTKOperator(Mixing(MANY[mix]), torch.rand(24, 4))


def test_two_samples_that_find_each_other_wherever_they_are():
    """The pair (17, 18) couples by its numbers, whatever the order and the size of the batch are."""
    torch.manual_seed(0)
    x = torch.rand(24, 4)
    x[17, 0], x[18, 0] = 5.0, 6.0

    class Pair(nn.Linear):
        def forward(self, x):
            u, one, other = super().forward(x), x[:, :1] == 5, x[:, :1] == 6
            return u + one * (other * u).sum(0)

    for engine in ENGINES:
        with pytest.raises(ValueError, match="samples couple"):
            ntk_gram(Pair(4, 2), x, engine=engine)


SMALL = {
    "mean": lambda u, size: u + size * u.mean(0),
    "first": lambda u, size: u + size * u[:1],
    "last": lambda u, size: u + size * u[-1:],
    "so far": lambda u, size: u + size * u.cumsum(0),
    "pairs": lambda u, size: u + size * u.roll(1, 0),
    "more than 16": lambda u, size: u + size * u.sum(0) * (len(u) > 16),
    "noise": lambda u, size: u * (1 + size * torch.randn_like(u)),
    "common noise": lambda u, size: u + size * torch.randn(u.shape[1]).to(u),
    "noise whose generator is put back": lambda u, size: u * (1 + size * drawn(u)),
}


LARGER = ("so far", "more than 16", "noise", "common noise", "noise whose generator is put back")
"""What changes the outputs by more than sqrt(eps) at the size 1e-8."""


def drawn(u):
    with torch.random.fork_rng():
        return torch.randn(1).to(u)


def eigenvalues(model, x):
    """Eigenvalues of the trace kernel of the function of the whole batch: a double loop of autograd."""
    rows, outputs = {}, model(x)
    for i in range(len(x)):
        for c in range(outputs.shape[1]):
            found = torch.autograd.grad(outputs[i, c], list(model.parameters()), retain_graph=True)
            rows[i, c] = torch.cat([each.flatten() for each in found])
    kernel = torch.tensor(
        [
            [sum(float(rows[i, c] @ rows[j, c]) for c in range(outputs.shape[1])) for j in range(len(x))]
            for i in range(len(x))
        ],
        dtype=torch.float64,
    )
    return torch.linalg.eigvalsh(kernel)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1e-8, 1e-9, 1e-11])
@pytest.mark.parametrize("mix", SMALL)
def test_what_is_too_small_to_be_refused_is_not_certified_and_lies_in_the_bounds(mix, size, engine):
    torch.manual_seed(0)
    model, x = Mixing(lambda u: SMALL[mix](u, size)).double(), torch.rand(24, 4).double()
    if size == 1e-8 and mix in LARGER:
        with pytest.raises(ValueError, match="samples couple"):
            ntk_gram(model, x, precision="certified", engine=engine)
        return
    gram = ntk_gram(model, x, precision="certified", engine=engine)
    assert "more than rounding explains (samples couple or the forward is random)" in gram.narrow
    found, truth = kernel_spectrum(gram), float(eigenvalues(model, x)[-1])
    assert not (found.lambda_max.certified)
    assert not (found.lambda_min.certified)
    assert gram.narrow in found.lambda_max.method
    assert found.lambda_max.lower <= truth <= found.lambda_max.upper


IN_DERIVATIVES = {
    "mean": lambda u: u.mean(0),
    "so far": lambda u: u.cumsum(0),
    "the last one": lambda u: u[-1:],
    "a statistic": lambda u: u * u.square().mean(),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("mix", IN_DERIVATIVES)
def test_samples_that_couple_in_their_derivatives_alone_are_not_certified(mix, size, engine):
    torch.manual_seed(0)

    def straight_through(u):
        other = IN_DERIVATIVES[mix](u)
        return u + size * (other - other.detach())

    model, x = Mixing(straight_through).double(), torch.rand(24, 4).double()
    if size == 1.0:
        with pytest.raises(ValueError, match=r"gradients of the outputs change .* samples couple|engine='jacobian'"):
            ntk_gram(model, x, precision="certified", engine=engine)
        return
    gram = ntk_gram(model, x, precision="certified", engine=engine)
    assert "gradients of the outputs" in gram.narrow
    assert not kernel_spectrum(gram).lambda_max.certified


def test_a_plan_that_is_used_again_checks_the_new_samples():
    torch.manual_seed(0)
    far = 100.0

    class Sometimes(nn.Linear):
        def forward(self, x):
            u = super().forward(x)
            return u + 1e-9 * u.mean(0) * bool((x == far).any())

    model, x = Sometimes(4, 2).double(), torch.rand(24, 4).double()
    plan = plan_ntk(model, x, precision="certified")
    assert ntk_gram(model, x, precision="certified", plan=plan).narrow == ""
    x[20] = far
    assert "samples couple" in ntk_gram(model, x, precision="certified", plan=plan).narrow


@pytest.mark.parametrize("size", [1e-9, 1e-3])
def test_a_random_forward_of_the_whole_batch_is_not_certified(size):
    torch.manual_seed(0)
    model, x = Mixing(lambda u: SMALL["noise"](u, size)).double(), torch.rand(6, 4).double()
    if size > 1e-8:
        with pytest.raises(ValueError, match="two forward passes of one batch differ"):
            ntk_gram(model, x, precision="certified", batch_norm="batch")
    else:
        gram = ntk_gram(model, x, precision="certified", batch_norm="batch")
        assert "from one forward to the next" in gram.narrow
        assert not kernel_spectrum(gram).lambda_max.certified


@pytest.mark.parametrize("which", ["rows", "columns"])
def test_both_sets_of_samples_are_looked_at(which):
    torch.manual_seed(0)
    model = Mixing(gate(lambda u: u + u.mean(0))).double()
    sets = [torch.rand(24, 4).double(), torch.rand(5, 4).double()]
    with pytest.raises(ValueError, match=r"samples couple|engine='jacobian'"):
        ntk_gram(model, *(sets if which == "rows" else sets[::-1]), engine="jacobian")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.first(x)[:, None] * torch.tensor([[[1.0], [2.0], [3.0]]]).to(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.head = kind(2, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.inner(x.unflatten(1, (2, 2)))[0][:, -1])


def deep(layers, activation, norm=nn.Identity):
    inner = [m for _ in range(layers) for m in (nn.Linear(16, 16), norm(16), activation())]
    return nn.Sequential(nn.Linear(4, 16), *inner, nn.Linear(16, 2))


ORDINARY = {
    "shallow": lambda: nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)),
    "deep": lambda: deep(20, nn.Tanh),
    "deep with ReLU": lambda: deep(10, nn.ReLU),
    "layer norms": lambda: deep(6, nn.GELU, nn.LayerNorm),
    "batch norms": lambda: deep(6, nn.ReLU, nn.BatchNorm1d),
    "wide": lambda: nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 10)),
    "attention": Attention,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 8, 2, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(72, 3),
    ),
    "softmax": lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(1), nn.Linear(6, 2), nn.LogSoftmax(1)),
    "dropout in eval mode": lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.SiLU(), nn.Linear(9, 2)),
}


@pytest.mark.parametrize("n", [1, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 64))])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_networks_stay_certified(name, n):
    torch.manual_seed(0)
    model, x = ORDINARY[name]().double(), torch.randn(n, 4).double()
    for engine in ENGINES:
        gram = ntk_gram(model, x, precision="certified", engine=engine)
        assert gram.narrow == ""
        assert kernel_spectrum(gram).lambda_max.certified


def test_a_network_whose_large_terms_cancel_is_judged_by_them():
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) + 1e4) - self.b.weight.sum() * 1e4

    torch.manual_seed(0)
    for n in (2, 24):
        assert ntk_gram(Cancelling().double(), torch.rand(n, 4).double(), precision="certified").narrow == ""
