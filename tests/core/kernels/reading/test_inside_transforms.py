"""Layers that are called inside a transform of ``torch.func``: their kernel is that of autograd alone, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import ntk_gram


class Inside(nn.Module):
    def __init__(self, code):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.code = nn.Linear(4, 5), nn.Linear(5, 2), code

    def one(self, x):
        return self.last(self.first(x).tanh())

    def forward(self, x):
        return self.code(self, x)


CODES = {
    "vmap over the samples": lambda m, x: torch.vmap(m.one)(x),
    "vmap within, and the last layer outside": lambda m, x: m.last(torch.vmap(m.first)(x).tanh()),
    "the Jacobian by the inputs": lambda m, x: torch.vmap(torch.func.jacrev(m.one))(x).flatten(1),
    "a directional derivative": lambda m, x: torch.func.jvp(m.one, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("name", CODES)
def test_the_kernel_of_layers_inside_a_transform(name):
    model, x = Inside(CODES[name]), torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    kernel = ntk_gram(model, x, outputs="trace").matrix
    exact = model.double()
    outputs = exact(x.double())
    right = torch.zeros(6, 6, dtype=torch.float64)
    for column in range(outputs.shape[1]):
        rows = []
        for row in range(6):
            found = torch.autograd.grad(
                outputs[row, column], [*exact.parameters()], retain_graph=True, allow_unused=True
            )
            pairs = zip(found, exact.parameters(), strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
        right += torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(kernel.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
