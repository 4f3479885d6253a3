"""A network with a module, or a parameter, under several names is evaluated as it is and left unchanged."""

from __future__ import annotations

import pytest
import torch
from kernels.networks import TwoNames
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import find_head
from lightning_conv.networks.hidden_features import last_hidden_features
from lightning_conv.networks.undisturbed import undisturbed


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("kind", [TwoNames, Tied])
def test_every_parameter_and_buffer_is_the_same_object_afterwards(kind):
    model = kind().eval()
    before = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    inputs = torch.randn(4, 3)
    ntk_gram(model, inputs)
    with undisturbed(model), torch.no_grad():
        module = StatelessModule(model, dtype=torch.float64)
        module.call({}, module.convert(inputs))
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(tensor is after[name] for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", [TwoNames, Tied])
def test_given_parameters_are_used_under_every_name(kind):
    model, inputs = kind().eval(), torch.randn(4, 3)
    with undisturbed(model), torch.no_grad():
        module = StatelessModule(model)
        doubled = {name: 2 * value for name, value in module.parameters.items()}
        found = module.outputs(doubled, inputs)
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.allclose(found, model(inputs), atol=1e-6)


def test_the_kernel_of_tied_weights_is_that_of_the_derivative_by_the_one_weight():
    model, inputs = Tied(), torch.randn(4, 3)
    rows = []
    for x in inputs:
        model.zero_grad()
        rows.append(
            torch.stack([torch.autograd.grad(out, model.first.weight, retain_graph=True)[0] for out in model(x)])
        )
    jacobian = torch.stack(rows).flatten(2)
    expected = torch.einsum("ncp,mcp->nm", jacobian, jacobian)
    assert torch.allclose(ntk_gram(model, inputs).matrix.float(), expected, rtol=1e-4)


def test_a_head_with_two_names_is_found_and_its_features_read():
    model, inputs = TwoNames().eval(), torch.randn(4, 3)
    head = find_head(model, inputs)
    assert head.module is model.head
    assert torch.allclose(last_hidden_features(model, head, inputs), model.trunk(inputs), atol=1e-6)
    assert isinstance(model.head.weight, nn.Parameter)
