"""Which losses an optimizer steps with: against the gradients that real backward passes and real optimizers would have."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from lightning_conv.callbacks.run.step.step_code import NoBackward, NoFlips
from lightning_conv.callbacks.run.step.still import StepRecord, Still


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 1)

    def losses(self, x):
        return self.a(x).square().mean(), self.b(self.a(x)).mean(), self.b(self.a(x).detach()).square().mean()


def stills(module):
    record = StepRecord()
    memo = {id(each): each for each in module.parameters()}
    real = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (module.a, module.b)]
    made = [Still(record, number) for number in range(2)]
    for each, of in zip(made, real, strict=True):
        each.read(of, memo, made)
    return record, made


class Real:
    """Steps at which the gradient of the first one is kept, by autograd."""

    def __init__(self, module):
        self.parts, self.first = [list(module.a.parameters()), list(module.b.parameters())], [None, None]

    def step(self, number):
        if self.first[number] is None and any(p.grad is not None for p in self.parts[number]):
            self.first[number] = [None if p.grad is None else p.grad.clone() for p in self.parts[number]]


@pytest.mark.parametrize("seed", range(12))
def test_a_random_order_of_passes_clears_and_steps_gives_the_sum_whose_gradient_the_first_step_takes(seed):
    order = random.Random(seed)
    actions = [
        order.choice(["pass 0", "pass 1", "pass 2", "step 0", "step 1", "clear 0", "clear 1", "clear"])
        for _ in range(14)
    ]
    actions += ["pass 1", "step 0", "step 1"]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))

    module = Two()
    real = Real(module)
    for action in actions:
        kind, _, which = action.partition(" ")
        if kind == "pass":
            module.losses(x)[int(which)].backward()
        elif kind == "step":
            real.step(int(which))
        else:
            (module if not which else (module.a, module.b)[int(which)]).zero_grad()

    copy = Two()
    record, optimizers = stills(copy)
    record.begin()
    with record.recording(copy), NoBackward(record.backward):
        for action in actions:
            kind, _, which = action.partition(" ")
            if kind == "pass":
                copy.losses(x)[int(which)].backward()
            elif kind == "step":
                optimizers[int(which)].step()
            elif which:
                optimizers[int(which)].zero_grad()
            else:
                copy.zero_grad()
    for number, part in enumerate((copy.a, copy.b)):
        found = record.loss_of(number, list(part.parameters()))
        assert (found is None) == (real.first[number] is None)
        if found is not None:
            gradients = torch.autograd.grad(found.total, list(part.parameters()), retain_graph=True, allow_unused=True)
            for mine, its in zip(gradients, real.first[number], strict=True):
                assert torch.allclose(mine, torch.zeros_like(mine) if its is None else its, atol=1e-6)
    assert all(each.grad is None for each in copy.parameters())


def test_a_loss_with_weights_and_with_named_inputs():
    module, x = Two(), torch.randn(4, 3)
    record, optimizers = stills(module)
    with record.recording(module), NoBackward(record.backward):
        weights = torch.arange(4.0).unsqueeze(1)
        module.b(module.a(x)).backward(weights, inputs=list(module.b.parameters()))
        for each in optimizers:
            each.step()
    assert record.loss_of(0, optimizers[0].parameters) is None
    total = record.loss_of(1, optimizers[1].parameters).total
    assert torch.equal(total, (module.b(module.a(x)) * weights).sum())


def test_what_a_step_switches_is_as_before_and_nothing_is_noted_outside():
    module, x = Two(), torch.randn(4, 3)
    record, (first, second) = stills(module)
    with record.recording(module), NoBackward(record.backward):
        with first.toggle_model():
            assert not module.b.weight.requires_grad
            module.losses(x)[1].backward()
            second.step()
        assert module.b.weight.requires_grad
        module.a.requires_grad_(False)
    assert all(each.requires_grad for each in module.parameters())
    assert record.loss_of(1, second.parameters) is None
    assert record.loss_of(0, first.parameters).steps == 0
    with NoBackward(record.backward):
        module.losses(x)[0].backward()
    assert len(record.losses) == 1


def test_a_closure_is_called_before_the_step_and_its_result_returned():
    module, x = Two(), torch.randn(4, 3)
    record, (first, _) = stills(module)

    def closure():
        record.backward(module.losses(x)[0])
        return 7

    with record.recording(module):
        assert first.step(closure) == 7
    assert record.loss_of(0, first.parameters).steps == 1


def test_switched_gradients_are_ignored_for_parameters_alone():
    module = Two()
    stands_for = module.a.weight.detach().requires_grad_() * 2  # no leaf: switching it off is an error
    with NoFlips([stands_for]):
        stands_for.requires_grad_(False)
        stands_for.requires_grad = False
        module.b.weight.requires_grad_(False)
        other = torch.zeros(2).requires_grad_()
    assert stands_for.requires_grad
    assert module.b.weight.requires_grad
    assert other.requires_grad
