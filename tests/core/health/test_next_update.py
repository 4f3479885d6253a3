"""A copy of an optimizer makes the step that the optimizer itself makes next, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizers_of_ones_own import Lion, Lookahead, Muon
from torch import nn, optim

from lightning_conv.health.step.next_update import next_update
from lightning_conv.health.step.optimizer_rules import UnknownStepError

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
    "muon": lambda p: Muon(p),
    "lookahead": lambda p: Lookahead(optim.Adam(p, lr=0.01)),
}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def gradients_of(model):
    loss = nn.functional.mse_loss(model(X), Y)
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def step(model, optimizer):
    for name, gradient in gradients_of(model).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()


def traces(model, optimizer):
    """All that the step of an optimizer may change."""
    numbers = [each.detach().clone() for each in model.parameters()]
    numbers += [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    own = {key: value for key, value in vars(optimizer).items() if isinstance(value, int)}
    return numbers, copy.deepcopy(optimizer.state_dict()), own


def same(some, others):
    if isinstance(some, torch.Tensor):
        return torch.equal(some, others)
    if isinstance(some, dict):
        return some.keys() == others.keys() and all(same(each, others[key]) for key, each in some.items())
    if isinstance(some, (list, tuple)):
        return len(some) == len(others) and all(map(same, some, others))
    return some == others


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_the_next_step_and_leaves_no_trace(name, scheduled, steps):
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled and name != "lookahead" else None
    for _ in range(steps):
        step(model, optimizer)
        if scheduler is not None:
            scheduler.step()
    before = traces(model, optimizer)
    found = next_update(optimizer, dict(model.named_parameters()), gradients_of(model))
    assert same(before, traces(model, optimizer))
    start = {key: each.detach().clone() for key, each in model.named_parameters()}
    step(model, optimizer)
    assert found.keys() == start.keys()
    for key, each in model.named_parameters():
        assert torch.equal(found[key], each.detach() - start[key]), key


def test_only_the_named_weights_are_updated_by_what_they_would_be():
    model = network()
    optimizer = optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.01)
    step(model, optimizer)
    gradients, named = gradients_of(model), dict(model.named_parameters())
    whole = next_update(optimizer, named, gradients)
    part = next_update(optimizer, {key: named[key] for key in ("2.weight", "0.bias")}, gradients)
    assert part.keys() == {"2.weight", "0.bias"}
    assert all(torch.equal(each, whole[key]) for key, each in part.items())


class Reaching(Lion):
    """Moves the weights of a network that its module knows, behind its groups."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            NETWORKS[-1][0].weight.add_(1.0)


class ReachingThroughData(Lion):
    """Does so through ``.data``, which raises no version of the weights."""

    def step(self, closure=None):
        super().step(closure)
        NETWORKS[-1][0].weight.data.mul_(0.5)


NETWORKS = []


@pytest.mark.parametrize("kind", [Reaching, ReachingThroughData])
def test_a_step_that_reaches_into_the_run_is_refused_and_what_it_changed_is_put_back(kind):
    model = network()
    NETWORKS.append(model)
    optimizer = kind(model.parameters())
    before = traces(model, optimizer)
    with pytest.raises(UnknownStepError, match="reaches into the run; what it changed was put back"):
        next_update(optimizer, dict(model.named_parameters()), gradients_of(model))
    assert same(before, traces(model, optimizer))


def replaced(optimizer):
    optimizer.step = lambda: None


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (optim.LBFGS, lambda _: None, "a copy of LBFGS takes no step .*closure"),
        (optim.SGD, lambda o: o.register_step_pre_hook(lambda *_: None), "SGD has step hooks"),
        (optim.SGD, lambda o: o.register_step_post_hook(lambda *_: None), "SGD has step hooks"),
        (optim.SGD, replaced, "SGD has a step that was replaced"),
        (Lion, lambda o: setattr(o, "on", iter([]).__class__), None),
    ],
)
def test_a_step_that_is_not_the_optimizers_own_is_refused(make, change, says):
    model = network()
    optimizer = make(model.parameters())
    change(optimizer)
    if says is None:  # attributes that need not be copied do not matter
        assert next_update(optimizer, dict(model.named_parameters()), gradients_of(model))
        return
    with pytest.raises(UnknownStepError, match=says):
        next_update(optimizer, dict(model.named_parameters()), gradients_of(model))


def test_weights_of_another_optimizer_are_refused():
    model = network()
    optimizer = optim.SGD(network().parameters())
    with pytest.raises(UnknownStepError, match="SGD trains none of these weights"):
        next_update(optimizer, dict(model.named_parameters()), gradients_of(model))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"optimizer": None}, TypeError, "optimizer: None; need an optimizer of these weights"),
        ({"optimizer": optim.SGD}, TypeError, "optimizer: the class SGD; need an optimizer of these weights"),
        ({"parameters": [1]}, TypeError, "parameters: [1] (list); need weights by name, such as dict(model.named"),
        ({"parameters": {"w": 3.0}}, TypeError, "parameters['w']: 3.0 (float); need a weight of the optimizer"),
        ({"gradients": None}, TypeError, "gradients: None; need gradients by the names of parameters="),
        (
            {"gradients": {}},
            ValueError,
            "gradients: none of '0.weight', '0.bias', '2.weight' and 1 more; pass one for each",
        ),
        ({"0.bias": None}, TypeError, "gradients['0.bias']: None; need a tensor of the shape (7,)"),
        ({"0.bias": torch.zeros(3)}, ValueError, "gradients['0.bias']: shape (3,); need that of the weight, (7,)"),
    ],
)
def test_a_bad_argument_of_an_update_is_named_and_nothing_is_touched(change, error, says):
    model = network()
    optimizer = optim.Adam(model.parameters())
    before = traces(model, optimizer)
    given = {"optimizer": optimizer, "parameters": dict(model.named_parameters()), "gradients": gradients_of(model)}
    given |= {name: each for name, each in change.items() if name in given}
    if "gradients" not in change:
        given["gradients"] |= {name: each for name, each in change.items() if name not in given}
    with pytest.raises(error) as raised:
        next_update(**given)
    assert str(raised.value).startswith(says)
    assert same(before, traces(model, optimizer))


def test_a_weight_without_a_gradient_is_left_out_as_the_hint_says():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gradients = gradients_of(model)
    gradients.pop("0.bias")
    with pytest.raises(ValueError, match=r"none of '0.bias'; .* leave these out of parameters="):
        next_update(optimizer, dict(model.named_parameters()), gradients)
    rest = {name: each for name, each in model.named_parameters() if name != "0.bias"}
    assert next_update(optimizer, rest, gradients).keys() == rest.keys()
