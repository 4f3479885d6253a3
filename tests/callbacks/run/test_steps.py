"""`describe_steps`: the rate of plain gradient descent, or the reason why a step is something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv.callbacks.run.steps import (
    NotPlainError,
    Parameters,
    Steps,
    decays,
    describe_optimizer,
    describe_steps,
)

SGD = torch.optim.SGD


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.fixture
def trainer(make_trainer, make_regression, network):
    """A trainer that is about to step with an optimizer."""

    def about_to_step(optimizer, **options):
        module, trainer = make_regression(network, 0.1), make_trainer(max_steps=1, **options)
        trainer.strategy._lightning_module = module
        trainer.strategy.optimizers = [optimizer]
        return trainer

    return about_to_step


@pytest.mark.parametrize(
    ("make", "rate", "said"),
    [
        (lambda n: SGD(n.parameters(), lr=0.1), 0.1, ""),
        (lambda n: SGD([{"params": [p]} for p in n.parameters()], lr=0.2), 0.2, ""),
        (lambda n: SGD(n.parameters(), lr=0.1, momentum=0.9), None, "SGD with momentum=0.9"),
        (lambda n: SGD(n.parameters(), lr=0.1, weight_decay=0.1), None, "SGD with weight_decay=0.1"),
        (lambda n: SGD(n.parameters(), lr=0.1, maximize=True), None, "SGD with maximize=True"),
        (lambda n: torch.optim.Adam(n.parameters()), None, "the optimizer is Adam, not torch.optim.SGD"),
        (
            lambda n: SGD([{"params": n[0].parameters(), "lr": 0.2}, {"params": n[1].parameters()}], lr=0.1),
            None,
            "different learning rates (0.1, 0.2)",
        ),
    ],
)
def test_the_rule_of_an_optimizer(network, trainer, make, rate, said):
    optimizer = make(network)
    found = describe_optimizer(optimizer)
    assert found.rate == rate
    assert said in found.reason
    assert bool(found.reason) == (rate is None)
    assert describe_steps(trainer(optimizer), Parameters(dict(network.named_parameters()), {})) == found


def test_of_some_parameters_only_their_groups_count(network, trainer):
    groups = [
        {"params": network[0].parameters(), "momentum": 0.9, "weight_decay": 1.0},
        {"params": network[1].parameters()},
    ]
    optimizer, head = SGD(groups, lr=0.1), Parameters(dict(network[1].named_parameters()))
    assert (
        describe_steps(trainer(optimizer), head) == describe_optimizer(optimizer, network[1].parameters()) == Steps(0.1)
    )
    assert describe_optimizer(optimizer).reason == "SGD with momentum=0.9"
    assert decays(optimizer, network[0].parameters())
    assert not decays(optimizer, network[1].parameters())
    other = Parameters({"weight": nn.Parameter(torch.zeros(1))})
    assert describe_steps(trainer(SGD(network.parameters(), lr=0.1)), other).rate is None


def test_a_kernel_over_some_of_the_trained_parameters_is_not_that_of_the_steps(network, trainer):
    optimizer = SGD(network.parameters(), lr=0.1)
    assert (
        describe_steps(trainer(optimizer), Parameters.of(network, ["0.weight", "0.bias", "1.weight", "1.bias"])).rate
        == 0.1
    )
    part = describe_steps(trainer(optimizer), Parameters.of(network, ["1.weight", "1.bias"]))
    assert part.reason == "the parameter 0.weight is trained but not among those of the kernel"
    network[1].bias.requires_grad_(False)
    whole = describe_steps(trainer(optimizer), Parameters.of(network, [name for name, _ in network.named_parameters()]))
    assert whole.reason == "the parameter 1.bias belongs to the kernel but is not trained"
    with pytest.raises(NotPlainError, match=r"1\.bias belongs to the kernel"):
        whole.required_rate()


def test_accumulated_batches_are_refused_unless_they_are_asked_for(network, trainer):
    optimizer, all_of_it = SGD(network.parameters(), lr=0.1), Parameters(dict(network.named_parameters()))
    accumulating = trainer(optimizer, accumulate_grad_batches=2)
    assert "accumulate_grad_batches=2" in describe_steps(accumulating, all_of_it).reason
    assert describe_steps(accumulating, all_of_it, accumulated=True).rate == 0.1


@pytest.mark.parametrize("of_class", [True, False])
def test_a_hook_that_may_change_the_gradients_is_allowed_only_where_the_step_is_compared(network, trainer, of_class):
    about = trainer(SGD(network.parameters(), lr=0.1))
    module, parameters = about.lightning_module, Parameters(dict(network.named_parameters()), {})
    if of_class:
        module.__class__ = type("Own", (type(module),), {"on_before_optimizer_step": lambda self, optimizer: None})
    else:
        module.on_before_optimizer_step = lambda optimizer: None
    assert "on_before_optimizer_step, which may change the gradients" in describe_steps(about, parameters).reason
    assert describe_steps(about, parameters, compared=True).rate == 0.1
