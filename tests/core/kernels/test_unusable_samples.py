"""Samples that a network cannot take are named, with what they are; an error of the network on others is its own."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_conv.kernels import NTKOperator
from lightning_conv.kernels.gram import ntk_gram
from lightning_conv.kernels.plan import plan_ntk

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
UNUSABLE = {
    "complex": (
        X.to(torch.complex64),
        RuntimeError,
        r"^inputs: Sequential was called on samples of \(5, 4\) of torch.complex64",
    ),
    "whole numbers": (
        X.long(),
        RuntimeError,
        r"^inputs: Sequential was called on samples of \(5, 4\) of torch.int64",
    ),
    "another shape": (
        X[:, :3],
        RuntimeError,
        r"^inputs: Sequential was called on samples of \(5, 3\) .*; pass what its forward takes",
    ),
    "without numbers": (X.to("meta"), TypeError, "^inputs: a tensor is on the device meta"),
    "sparse": (X.to_sparse(), TypeError, "^inputs: tensor 0 is sparse_coo; need dense tensors"),
    "nested": (torch.nested.nested_tensor([X[:2], X[:3]]), TypeError, "^inputs: tensor 0 is nested; need dense"),
    "quantised": (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), TypeError, "^inputs: tensor 0 is quantised; need"),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:torch.ao.quantization", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("use", [ntk_gram, plan_ntk, NTKOperator], ids=["kernel", "plan", "operator"])
@pytest.mark.parametrize("what", UNUSABLE)
def test_they_are_named(what, use):
    samples, kind, message = UNUSABLE[what]
    with pytest.raises(kind) as failed:
        use(network(), samples)
    said = [str(failed.value), *getattr(failed.value, "__notes__", ())]
    assert any(re.search(message, each) for each in said), said


class Picky(nn.Module):
    """Fails when it is differentiated, and not when it is called."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.Broken.apply(self.linear(x))


def test_an_error_that_is_not_of_the_call_is_left_as_it_is():
    with pytest.raises(RuntimeError, match=r"^no way back$"):
        ntk_gram(Picky(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 3}, r"^parameters: 3 \(int\); need names"),
        ({"parameters": ["0.*", 3]}, "^parameters: .*; need names"),
        ({"plan": 3}, r"^plan: 3 \(int\); need a plan of plan_ntk"),
        ({"processes": 3}, r"^processes: 3 \(int\); need Processes"),
        ({"remeasure": "x"}, r"^remeasure: 'x' \(str\); need True or False"),
    ],
)
def test_options_of_another_type(options, message):
    with pytest.raises(TypeError, match=message):
        ntk_gram(network(), X, **options)
