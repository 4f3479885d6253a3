"""Forwards that make numbers of a type of their own: ``certified`` is refused with the place, ``exact`` has bounds that hold."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from lightning_conv import NTKOperator, kernel_spectrum, ntk_gram, plan_ntk, resolved_spectrum
from lightning_conv.networks.origins import NoSuchPathError

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two layers, and a function of both that may convert; ``narrow=False`` gives the same network without conversion."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function, self.narrow = nn.Linear(4, 6), nn.Linear(6, 2), function, True

    def forward(self, x):
        return self.function(self, x)

    def to32(self, x):
        return x.float() if self.narrow else x


def made_zeros(net, x):
    h = torch.zeros(len(x), 6, dtype=torch.float32 if net.narrow else x.dtype)
    h[:, :6] = net.a(x).tanh()
    return net.b(h)


def made_ones(net, x):
    ones = torch.ones(len(x), 6, dtype=torch.float32 if net.narrow else x.dtype)
    return net.b(torch.baddbmm(ones[:, None], net.a(x)[:, None].tanh(), torch.eye(6).to(x).expand(len(x), 6, 6))[:, 0])


def one_hot(net, x):
    return net.b(net.a(x).tanh()) + net.to32(F.one_hot((x[:, 0] > 0).long(), 6).to(x)) @ net.b.weight.T


def checked(net, x):
    if net.narrow and x.dtype != torch.float32:
        raise TypeError("expected float32")
    return net.b(net.a(x).tanh())


REFUSED = {  # the forward, and the operation that the error names
    "float": (lambda net, x: net.b(net.a(net.to32(x)).tanh()), "torch.Tensor.float"),
    "float of a layer": (lambda net, x: net.b(net.to32(net.a(x)).tanh()), "torch.Tensor.float"),
    "to": (lambda net, x: net.b(net.a(x).to(torch.float32 if net.narrow else x.dtype)), "torch.Tensor.to"),
    "type": (lambda net, x: net.b(net.a(x).type(torch.float32 if net.narrow else x.dtype)), "torch.Tensor.type"),
    "zeros": (made_zeros, "torch.zeros"),
    "ones": (made_ones, "torch.ones"),
    "one_hot": (one_hot, "torch.Tensor.float"),
    "softmax": (
        lambda net, x: net.b(F.softmax(net.a(x), -1, dtype=torch.float32 if net.narrow else x.dtype)),
        "torch.nn.functional.softmax",
    ),
    "ends in float": (lambda net, x: net.to32(net.b(net.a(x).tanh())), "torch.Tensor.float"),
    "checks the type": (checked, "its own code"),
}


def wrapped(function, inside):
    torch.manual_seed(0)
    net = Network(function)
    return net, (nn.Sequential(nn.Linear(4, 4), net) if inside else net)


def eigenvalues(model, net, inputs):
    """Of the trace kernel of the network without its conversions: the Jacobian by autograd in float64."""
    net.narrow = False
    own = {name: p.detach().double() for name, p in model.named_parameters()}
    rows = jacrev(lambda parameters: functional_call(model, parameters, (inputs.double(),)))(own)
    net.narrow = True
    flat = torch.cat([each.flatten(2) for each in rows.values()], 2)
    return torch.linalg.eigvalsh(torch.einsum("icp,jcp->ij", flat, flat)).clamp(min=0)


@pytest.mark.parametrize("inside", [False, True], ids=["the model itself", "a layer of it"])
@pytest.mark.parametrize("name", REFUSED)
def test_certified_is_refused_with_the_place_and_the_cure(name, inside):
    function, operation = REFUSED[name]
    _, model = wrapped(function, inside)
    where = r"'1' \(Network\)" if inside else r"the forward of the network itself \(Network\)"
    with pytest.raises(NoSuchPathError, match=f'precision: "certified".*{where}.*{operation}.*use precision="exact"'):
        ntk_gram(model, X, precision="certified")
    with pytest.raises(NoSuchPathError, match=where):
        plan_ntk(model, X, precision="certified")
    with pytest.raises(NoSuchPathError, match=where + ".*dtype=None"):
        NTKOperator(model, X, dtype=torch.float64)
    with pytest.raises(NoSuchPathError, match=where):
        resolved_spectrum(model, X, precision="certified")


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("name", REFUSED)
def test_bounds_hold_the_eigenvalues_without_the_conversion(name, precision, engine):
    net, model = wrapped(REFUSED[name][0], inside=True)
    inputs = torch.cat([X[:5], X[:1] + 1e-5])
    gram = ntk_gram(model, inputs, precision=precision, engine=engine)
    spectrum = kernel_spectrum(gram)
    exact = eigenvalues(model, net, inputs)
    for bounded, true in ((spectrum.lambda_min, exact[0]), (spectrum.lambda_max, exact[-1])):
        assert bounded.lower <= float(true) <= bounded.upper
        assert not bounded.certified
    assert gram.narrow
    assert gram.jacobian_error < 1e-4  # that of float32, not the unknown


@pytest.mark.parametrize("start", ["fast", "exact", "certified"])
@pytest.mark.parametrize("name", REFUSED)
def test_resolved_spectrum_ends_at_exact_with_the_reason(name, start):
    _, model = wrapped(REFUSED[name][0], inside=True)
    gram, spectrum = resolved_spectrum(model, torch.cat([X, X[:1]]), start=start)
    assert gram.precision == "exact"
    assert spectrum.lambda_min.lower <= 0 <= spectrum.lambda_min.upper  # two samples are equal
    assert not spectrum.lambda_min.certified
    assert not spectrum.lambda_min.resolved
    assert "'1' (Network)" in spectrum.lambda_min.reason


def test_what_float32_resolves_needs_no_float64():
    _, model = wrapped(REFUSED["float"][0], inside=False)
    gram, spectrum = resolved_spectrum(model, 3 * torch.eye(4))
    assert gram.precision == "fast"
    assert spectrum.lambda_min.resolved


def autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=net.narrow):
        return net.b(net.a(x).tanh())


IN_16_BITS = {
    "autocast": autocast,
    "autocast, then float": lambda net, x: autocast(net, x).float() if net.narrow else autocast(net, x),
    "ends in bfloat16": lambda net, x: net.b(net.a(x).tanh()).to(torch.bfloat16 if net.narrow else x.dtype),
    "ends in float16": lambda net, x: net.b(net.a(x).tanh()).to(torch.float16 if net.narrow else x.dtype),
}


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("name", IN_16_BITS)
def test_bounds_hold_for_forwards_in_16_bits(name, engine):
    net, model = wrapped(IN_16_BITS[name], inside=True)
    spectrum = kernel_spectrum(ntk_gram(model, X, engine=engine))
    exact = eigenvalues(model, net, X)
    assert spectrum.lambda_min.lower <= float(exact[0]) <= spectrum.lambda_min.upper
    assert spectrum.lambda_max.lower <= float(exact[-1]) <= spectrum.lambda_max.upper
    assert not spectrum.lambda_min.certified


def test_samples_that_couple_are_refused_in_16_bits_too():
    def coupled(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = net.a(x)
            return net.b((h - h.mean(0)).tanh())

    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(wrapped(coupled, inside=False)[1], X)


def test_a_model_in_float64_that_ends_in_float32_is_not_certified():
    net, model = wrapped(REFUSED["ends in float"][0], inside=False)
    gram = ntk_gram(model.double(), X.double())
    assert "float32" in gram.narrow
    exact = eigenvalues(model, net, X)
    spectrum = kernel_spectrum(gram)
    assert spectrum.lambda_min.lower <= float(exact[0]) <= spectrum.lambda_min.upper
    with pytest.raises(NoSuchPathError, match="the outputs are of that type"):
        ntk_gram(model, X.double(), precision="certified")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_16_bits_are_evaluated_in_float32(dtype):
    net, model = wrapped(lambda net, x: net.b(net.a(x.to(net.b.weight.dtype)).tanh()), inside=False)
    exact = eigenvalues(model.to(dtype), net, X.to(dtype))
    for precision in ("exact", "certified"):
        smallest = kernel_spectrum(ntk_gram(model, X.to(dtype), precision=precision)).lambda_min
        assert smallest.lower <= float(exact[0]) <= smallest.upper
        assert smallest.certified == (precision == "certified")
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_type_that_the_module_keeps_beside_its_weights_is_named():
    _, model = wrapped(lambda net, x: net.b(net.a(x.to(torch.bfloat16)).tanh()), inside=True)
    with pytest.raises(
        NoSuchPathError, match=r"'1' \(Network\) makes torch.bfloat16 \(torch.Tensor.to\).*model.float\(\)"
    ):
        ntk_gram(model.bfloat16(), X)


def test_errors_with_another_cause_stay_what_they_are():
    _, model = wrapped(lambda net, x: net.b(x), inside=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ntk_gram(model, X, precision="certified")
    _, model = wrapped(lambda net, x: net.b(net.a(x) - net.a(x).mean(0)), inside=False)
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(model, X, precision="certified")
