"""The outputs that a loss is a function of are found in its graph, whatever the code around them does."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_conv.networks.observed.calls import CallWatch
from lightning_conv.networks.observed.frontier import find_outputs, leaves_of

N = 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 3)
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x):
        return self.decoder(self.encoder(x))


class WithLoss(nn.Module):
    """Computes its loss itself, as language models do."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels):
        logits = self.net(x)
        return SimpleNamespace(loss=(logits[:, 1:] - labels[:, 1:]).square().mean(), logits=logits)


class LossAlone(WithLoss):
    def forward(self, x, labels):
        return super().forward(x, labels).loss


def names(model, code):
    watch = CallWatch()
    with watch.watching(model):
        loss = code(model, torch.randn(N, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    found = find_outputs(
        loss, watch.outermost, lambda output: output.result.tensor.ndim > 0 and len(output.result.tensor) == N
    )
    own = {id(p): name for name, p in model.named_parameters()}
    places = [(each.call.name, each.call.number, each.result.place) for each in found.found]
    return places, sorted(own[id(leaf)] for leaf in found.beside)


def accuracy_first(model, x):
    with torch.no_grad():
        model(x)
    return model(x).square().mean()


@pytest.mark.parametrize(
    ("model", "code", "expected", "beside"),
    [
        (Net, lambda m, x: m(x).square().mean(), [("", 0, ())], []),
        (Net, accuracy_first, [("", 1, ())], []),
        # in place, afterwards
        (Net, lambda m, x: m(x).mul_(2).square().mean(), [("", 0, ())], []),
        (Net, lambda m, x: m.decoder(m.encoder(x)).square().mean(), [("decoder", 0, ())], []),
        # a term of the code, and two heads
        (Net, lambda m, x: m.decoder(h := m.encoder(x)).sum() + h.sum(), [("encoder", 0, ()), ("decoder", 0, ())], []),
        (Net, lambda m, x: m.one(h := m.encoder(x)).sum() + m.two(h).sum(), [("one", 0, ()), ("two", 0, ())], []),
        # two calls of one module
        (Net, lambda m, x: (m(x) * m(2 * x)).sum(), [("", 0, ()), ("", 1, ())], []),
        (Net, lambda m, x: m.forward(x).square().mean(), [("decoder", 0, ())], []),
        (Net, lambda m, x: m(x).sum() + m.one.weight.square().sum(), [("", 0, ())], ["one.weight"]),
        (WithLoss, lambda m, x: m(x, labels=x).loss, [("", 0, ("logits",))], []),
        (LossAlone, lambda m, x: m(x, labels=x), [("net", 0, ())], []),
        (Net, lambda m, x: (x @ m.decoder.weight).sum(), [], ["decoder.weight"]),
    ],
)
def test_the_outputs_are_those_that_the_loss_depends_on_directly(model, code, expected, beside):
    assert names(model(), code) == (expected, beside)


def test_an_error_inside_a_call_that_the_code_catches_leaves_the_others_in_order():
    def code(model, x):
        with contextlib.suppress(RuntimeError):
            model(x[:, :2])
        return model(x).sum()

    assert names(Net(), code)[0] == [("", 1, ())]


def test_the_leaves_of_a_graph_are_what_a_backward_pass_reaches():
    a, b, c = (nn.Parameter(torch.randn(2, 2)) for _ in range(3))
    c.requires_grad_(False)
    loss = ((a @ b.detach() + c).sum() * a.sum()) + (b * 0).sum().detach()
    assert [id(each) for each in leaves_of(loss)] == [id(a)]
    loss.backward()
    assert a.grad is not None
    assert b.grad is None
    assert leaves_of(torch.zeros(())) == []
