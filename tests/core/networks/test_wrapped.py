"""Scripted, compiled and wrapped modules have the kernel of what is inside; what has none is refused in one sentence."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from dense_kernels import assert_same, naive_gram
from torch import nn

from lightning_conv import NTKOperator, ntk_gram, plan_ntk

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


WRAPPED = {  # and the names of its parameters
    "scripted": (torch.jit.script, "{}"),
    "traced": (lambda model: torch.jit.trace(model, X), "{}"),
    "scripted inside": (lambda model: nn.Sequential(torch.jit.script(model)), "0.{}"),
    "compiled": (torch.compile, "_orig_mod.{}"),
    "compiled inside": (lambda model: nn.Sequential(torch.compile(model)), "0._orig_mod.{}"),
    "DataParallel": (nn.DataParallel, "module.{}"),
    "DataParallel of a compiled one": (lambda model: nn.DataParallel(torch.compile(model)), "module._orig_mod.{}"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_kernel_is_that_of_the_module_inside(name, engine):
    wrap, names = WRAPPED[name]
    model = network()
    expected = naive_gram(copy.deepcopy(model), X, "trace")
    wrapped = wrap(model)
    before = [p.clone() for p in wrapped.parameters()]
    found = ntk_gram(wrapped, X, engine=engine)
    assert_same(found.matrix, expected, 1e-5)
    assert found.parameters == tuple(names.format(name) for name, _ in model.named_parameters())
    if name != "traced":
        assert_same(ntk_gram(wrapped, X, engine=engine, precision="certified").matrix, expected, 1e-12)
    assert all(torch.equal(p, q) for p, q in zip(wrapped.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["compiled", "DataParallel"])
def test_layer_rules_and_operators_see_through_wrappers(kind):
    model = network()
    expected = naive_gram(copy.deepcopy(model), X, "trace")
    wrapped = WRAPPED[kind][0](model)
    assert len(ntk_gram(wrapped, X).structured) == 4
    assert_same(NTKOperator(wrapped, X, outputs="trace", dtype=torch.float64).dense(), expected, 1e-12)


def quantised(inside):
    model = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8)
    return nn.Sequential(nn.Linear(4, 4), model) if inside else model


REFUSED = {
    "lazy layer": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)),
        r"'1' \(LazyLinear\) has no weights yet.*run one batch first",
    ),
    "lazy statistics": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False)),
        r"'1' \(LazyBatchNorm1d\) has no weights yet",
    ),
    "lazy module": (lambda: nn.LazyLinear(3), r"the module itself \(LazyLinear\) has no weights yet"),
    "quantised": (lambda: quantised(False), r"'0' \(Linear\) is quantised.*no gradients.*before the quantisation"),
    "quantised inside": (lambda: quantised(True), r"'1\.0' \(Linear\) is quantised"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [ntk_gram, plan_ntk, NTKOperator])
@pytest.mark.parametrize("name", REFUSED)
def test_layers_without_a_kernel_are_refused_by_name(name, call):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(make(), X)


def test_a_lazy_layer_works_after_one_batch():
    model = REFUSED["lazy layer"][0]()
    model(X)
    assert_same(ntk_gram(model, X, precision="certified").matrix, naive_gram(model, X, "trace"), 1e-12)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3), function

    def forward(self, x):
        return self.function(self.layer(x))


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


Pair = namedtuple("Pair", "mean scale")

FORMS = {
    "tuple": (lambda u: (u, u.exp()), "[0]"),
    "list": (lambda u: [u.long(), u], "[1]"),
    "dict": (lambda u: {"size": 3, "logits": u}, "['logits']"),
    "dataclass": (lambda u: Output(u), ".logits"),
    "named tuple": (lambda u: Pair(u, u), ".mean"),
    "nested": (lambda u: {"heads": [Output(u), u]}, "['heads'][0].logits"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_cure_for_several_outputs_works_when_it_is_followed(name):
    function, place = FORMS[name]
    model = Returns(function)
    with pytest.raises(TypeError) as caught:
        ntk_gram(model, X)
    said = f"forward returns model(*inputs){place} (Probe(forward_fn=lambda model, inputs: model(inputs){place}))"
    assert said in str(caught.value)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            return eval(f"model(*inputs){place}", {"model": self.model, "inputs": inputs})

    plain = naive_gram(nn.Sequential(copy.deepcopy(model.layer)), X, "trace")
    assert_same(ntk_gram(Wrapped(), X, precision="certified").matrix, plain, 1e-12)


@pytest.mark.parametrize("function", [lambda u: u.long(), lambda u: None, lambda u: "u", lambda u: (u.long(), 3)])
def test_results_without_a_floating_tensor_are_refused(function):
    with pytest.raises(TypeError, match=r"model: returned .*need one floating tensor\. Wrap the model"):
        ntk_gram(Returns(function), X)
