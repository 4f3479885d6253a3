"""The loss on fixed samples and its gradient, against autograd on the network itself, and nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_conv.losses.gradient import SampleLoss, inner, norm, wide


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Softplus(), nn.Linear(7, 3))


INPUTS = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(20) % 3


@pytest.mark.parametrize("chunk", [128, 7])
@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (nn.MSELoss(), torch.randn(20, 3, generator=torch.Generator().manual_seed(2))),
        (nn.MSELoss(reduction="sum"), torch.randn(60, generator=torch.Generator().manual_seed(2))),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])), CLASSES),
        (lambda u, y: (u.logsumexp(1) - u[torch.arange(len(y)), y]).pow(2).mean(), CLASSES),
    ],
)
def test_it_is_autograds_in_eval_mode_in_any_chunks(loss_fn, targets, chunk):
    model = network().double()
    model(INPUTS.double())  # running statistics of their own
    names = [name for name, _ in model.named_parameters()]
    value, gradient = SampleLoss(model, INPUTS.double(), targets, loss_fn, chunk=chunk).gradient(names)
    reference = copy.deepcopy(model).eval()
    exact = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
    y = targets.double().reshape(20, 3) if targets.is_floating_point() else targets
    loss = exact(reference(INPUTS.double()), y)
    loss.backward()
    assert value == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(gradient[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert SampleLoss(model, INPUTS.double(), targets, loss_fn, chunk=chunk).value() == pytest.approx(value, rel=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    model, targets = network().double(), torch.zeros(20, 3, dtype=torch.float64)
    names = ["0.weight", "3.bias"]
    gradient = SampleLoss(model, INPUTS.double(), targets, nn.MSELoss()).gradient(names)[1]
    for name in names:
        parameter = dict(model.named_parameters())[name]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[2 % parameter.numel()] += sign * 1e-6
                ends.append(SampleLoss(model, INPUTS.double(), targets, nn.MSELoss()).value())
                parameter.view(-1)[2 % parameter.numel()] -= sign * 1e-6
        slope = (ends[0] - ends[1]) / 2e-6
        assert float(gradient[name].flatten()[2 % parameter.numel()]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_frozen_statistics_are_those_of_train_mode():
    model = network().double()
    value = SampleLoss(model, INPUTS.double(), CLASSES, nn.CrossEntropyLoss(), batch_norm="frozen").value()
    expected = nn.functional.cross_entropy(copy.deepcopy(model).train()(INPUTS.double()), CLASSES)
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)


def test_nothing_is_left_on_the_network():
    model = network()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    SampleLoss(model, INPUTS, CLASSES, nn.CrossEntropyLoss()).gradient(["0.weight"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())


def test_a_parameter_that_is_not_used_has_gradient_zero():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 1), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    names = ["used.weight", "spare.weight"]
    gradient = SampleLoss(Unused(), INPUTS, torch.zeros(20), nn.MSELoss()).gradient(names)[1]
    assert float(gradient["spare.weight"].abs().max()) == 0
    assert norm(gradient) == pytest.approx(float(gradient["used.weight"].norm()), rel=1e-6)
    assert inner(gradient, gradient) == pytest.approx(norm(gradient) ** 2)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"targets: shape \(20, 2\) for outputs of shape \(20, 3\)"):
        SampleLoss(network(), INPUTS, torch.zeros(20, 2), nn.MSELoss()).value()
    with pytest.raises(ValueError, match="reduction"):
        SampleLoss(network(), INPUTS, torch.zeros(20, 3), nn.MSELoss(reduction="none")).value()


@pytest.mark.parametrize("chunk", [128, 7])
def test_the_gradient_at_other_weights_in_another_precision_is_that_of_a_network_with_them(chunk):
    model = network().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    names = [name for name, _ in model.named_parameters()]
    loss = SampleLoss(model, INPUTS, CLASSES, nn.CrossEntropyLoss(), chunk=chunk, dtype=torch.float64)
    value, gradient = loss.gradient(names, at={name: p.detach() for name, p in other.named_parameters()})
    exact = nn.functional.cross_entropy(other.double()(INPUTS.double()), CLASSES)
    expected = torch.autograd.grad(exact, list(other.parameters()))
    assert value == pytest.approx(float(exact.detach()), rel=1e-12)
    for name, reference in zip(names, expected, strict=True):
        torch.testing.assert_close(gradient[name], reference, rtol=1e-10, atol=1e-14)


def test_numbers_are_as_wide_as_the_device_allows():
    class OnApple(torch.Tensor):
        device = torch.device("mps")

    numbers = torch.tensor([1.5, -0.25])
    assert wide(numbers).dtype == torch.float64
    assert wide(numbers.half().as_subclass(OnApple)).dtype == torch.float32
    assert wide(numbers).tolist() == numbers.tolist()


@pytest.mark.parametrize("batch_norm", ["eval", "frozen"])
@pytest.mark.parametrize("chunk", [128, 7])
def test_outputs_are_those_of_the_network_in_the_given_mode_and_precision(batch_norm, chunk):
    model = network()
    model(INPUTS)
    asked = SampleLoss(
        model, INPUTS, torch.zeros(20, 3), nn.MSELoss(), batch_norm=batch_norm, chunk=chunk, dtype=torch.float64
    )
    reference = copy.deepcopy(model).double().train(batch_norm == "frozen")
    assert torch.allclose(asked.outputs(), reference(INPUTS.double()), rtol=1e-12, atol=1e-12)
    assert asked.outputs().dtype == torch.float64


@pytest.mark.parametrize("chunk", [128, 7])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_value_at_other_weights_is_that_of_a_network_with_them(dtype, chunk):
    model, other = network(), network()
    with torch.no_grad():
        for each in (other[0].weight, other[3].bias):
            each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(3)))
    changed = {name: dict(other.named_parameters())[name].detach().double() for name in ("0.weight", "3.bias")}
    found = SampleLoss(model, INPUTS, CLASSES, nn.CrossEntropyLoss(), chunk=chunk, dtype=dtype)
    own = found.value()
    assert (
        found.value(at=changed)
        == SampleLoss(other, INPUTS, CLASSES, nn.CrossEntropyLoss(), chunk=chunk, dtype=dtype).value()
    )
    assert found.value() == own != found.value(at=changed)
