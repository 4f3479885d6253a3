"""A sample that sees others of its batch, all of them or only earlier ones, has no kernel of its own; that is refused at every n."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import NTKOperator, ntk_gram


class Mixing(nn.Module):
    """A linear layer, and what a function of the whole batch makes of its outputs."""

    def __init__(self, mix):
        super().__init__()
        self.layer, self.mix = nn.Linear(4, 2), mix

    def forward(self, x):
        return self.mix(self.layer(x))


class Swapped(nn.Module):
    """A recurrent layer whose time runs along the batch."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.cell(x[:, None])[0][:, 0])


MIXES = {
    "the sum of the samples so far": lambda u: u.cumsum(0),
    "the one before": lambda u: u + torch.cat([torch.zeros_like(u[:1]), u[:-1]]),
    "the first one": lambda u: u + u[:1],
    "the last one": lambda u: u + u[-1:],
    "the largest so far": lambda u: u.cummax(0).values,
    "the mean of all": lambda u: u - u.mean(0),
    "its place": lambda u: u * torch.arange(1, len(u) + 1)[:, None],
    "its neighbour in a pair": lambda u: u + u.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if len(u) % 2 == 0 else u,
}


@pytest.mark.parametrize("n", [2, 3, 4, 20])
@pytest.mark.parametrize("mix", MIXES)
def test_a_sample_that_sees_another_is_refused(mix, n):
    torch.manual_seed(0)
    model, x = Mixing(MIXES[mix]), torch.rand(n, 4)
    for measure in (
        lambda: ntk_gram(model, x),
        lambda: ntk_gram(model, x, engine="jacobian"),
        lambda: NTKOperator(model, x),
    ):
        with pytest.raises(ValueError, match=r"model: the outputs .* change by .* so samples couple"):
            measure()


@pytest.mark.parametrize("n", [2, 3, 20])
def test_a_recurrent_layer_along_the_batch_is_refused(n):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(Swapped(), torch.rand(n, 4))


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_samples_on_their_own_are_accepted_in_any_number(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Softmax(1), nn.Linear(6, 2))
    assert ntk_gram(model, torch.rand(n, 4)).matrix.shape == (n, n)
