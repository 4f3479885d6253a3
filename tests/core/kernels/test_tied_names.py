"""A pattern selects a tied parameter under any of its names; the kernel has its first one."""

import pytest
import torch
from torch import nn

from lightning_conv import NTKOperator, ntk_gram, plan_ntk, resolved_spectrum
from lightning_conv.kernels.reading.parameters import matching_names
from lightning_conv.networks.parameter_names import aliases_of


def linear_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model, torch.randn(5, 6), "2.*", [model[0].weight, model[2].bias]


class Decoder(nn.Module):
    """A decoder whose table is that of the encoder, as in language models."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(self.table(words).mean(1).tanh())


def embedding():
    model = Decoder()
    return model, torch.randint(7, (5, 3)), "out.*", [model.table.weight, model.out.bias]


def shared_module():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 2))
    return model, torch.randn(5, 6), ["2.weight", "4.bias"], [layer.weight, model[4].bias]


def bias():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].bias = model[0].bias
    return model, torch.randn(5, 6), "2.bias", [model[0].bias]


CASES = {make.__name__: make for make in (linear_layers, embedding, shared_module, bias)}


def by_autograd(model, inputs, parameters):
    """The trace kernel over these tensors, one gradient per output in float64."""
    model.double()
    outputs = model(inputs.double() if inputs.is_floating_point() else inputs)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(u, parameters, retain_graph=True)])
        for u in outputs.flatten()
    ]
    jacobian = torch.stack(rows).unflatten(0, outputs.shape)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian)


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_counts_what_the_pattern_names(case, engine):
    model, inputs, pattern, tensors = CASES[case]()
    found = ntk_gram(model, inputs, parameters=pattern, precision="certified", engine=engine)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert set(found.parameters) == {names[id(each)] for each in tensors}
    assert plan_ntk(model, inputs, parameters=pattern).parameters == found.parameters
    operator = NTKOperator(model, inputs, parameters=pattern, outputs="trace", dtype=torch.float64)
    assert operator.parameters == found.parameters
    assert resolved_spectrum(model, inputs, parameters=pattern)[0].parameters == found.parameters
    expected = by_autograd(model, inputs, tensors)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.dense(), expected, rtol=1e-10, atol=1e-10)


def test_each_parameter_is_chosen_once_in_the_order_of_the_model():
    model = linear_layers()[0]
    known = aliases_of(model)
    assert list(known) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert matching_names(known, ["2.*", "0.weight"]) == ("0.weight", "2.bias")
    with pytest.raises(ValueError, match=r"\['3\.\*'\].*2\.weight"):
        matching_names(known, ["3.*", "2.*"])
