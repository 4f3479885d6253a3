"""Terms of an optimizer beside the gradient are found on copies, and the run's optimizer and weights stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lightning_conv.callbacks.guard.certify.optimizer_copy import (
    OptimizerCopy,
    moves_without_gradient,
    steps_depend_on_weights,
)
from lightning_conv.callbacks.guard.certify.run_checks import untrained


class Decaying(SGD):
    """SGD with a decay of its own that acts as ``acts`` says."""

    def __init__(self, parameters, acts, lr=0.05):
        super().__init__(parameters, lr)
        self.acts, self.count = acts, 0

    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    self.state[each]["n"] = self.state[each].get("n", 0) + 1
                    share = self.acts(each, self.state[each]["n"])
                    each.data.sub_(0.01 * share * each.data)
        self.count += 1
        return super().step(closure)


TERMS = {
    "where there is a gradient": lambda p, n: float(p.grad.norm() > 0),
    "by the sign": lambda p, n: (p.grad * p.data > 0).to(p.dtype),
    "after eight steps": lambda p, n: float(n > 8),
    "every fourth step": lambda p, n: float(n % 4 == 0),
    "far out": lambda p, n: float(p.data.norm() > 30),
    "by a ratio": lambda p, n: float(p.grad.norm() / p.data.norm()),
}


def trained(make, steps=2):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = make(list(layer.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(7, 5)).square().mean().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("name", TERMS)
def test_a_term_in_the_weights_is_found(name):
    layer, optimizer = trained(lambda p: Decaying(p, TERMS[name]))
    assert steps_depend_on_weights(optimizer, list(layer.parameters()))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True),
        lambda p: Adam(p, 0.01),
        lambda p: AdamW(p, 0.01, weight_decay=0.0),
        lambda p: RMSprop(p, 0.01, momentum=0.5),
        lambda p: Decaying(p, lambda *_: 0.0),
    ],
)
def test_without_one_copies_move_alike_and_nothing_of_the_run_changes(make):
    layer, optimizer = trained(make)
    weights, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    assert not steps_depend_on_weights(optimizer, list(layer.parameters()))
    assert not moves_without_gradient(optimizer, list(layer.parameters()))
    assert not moves_without_gradient(optimizer, list(layer.parameters()), present=False)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(weights[name], each) for name, each in layer.state_dict().items())
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_a_scheduler_that_wraps_the_step_does_not_lead_back_to_the_run():
    layer, optimizer = trained(lambda p: Adam(p, 0.01))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [each.detach().clone() for each in layer.parameters()]
    twin = OptimizerCopy(optimizer, list(layer.parameters()), remembers=True)
    twin.step([torch.ones_like(each) for each in before])
    assert all(map(torch.equal, before, layer.parameters()))
    assert not any(map(torch.equal, before, twin.parameters))


def test_parameters_that_the_optimizer_does_not_move_are_named():
    layer = nn.Linear(3, 2)
    both = [layer.weight, layer.bias]
    assert untrained(SGD(both, 0.1), both) == ""
    assert untrained(SGD([layer.weight], 0.1), both) == "bias"
    groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.0}]
    assert untrained(SGD(groups, 0.1), both) == "bias"
    assert untrained(SGD(both, 0.0), both) == ""  # the end of a schedule
