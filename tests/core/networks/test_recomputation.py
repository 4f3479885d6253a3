"""Networks with activation checkpoints have the kernel of the same network without them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_conv import ntk_gram
from lightning_conv.kernels import NTKOperator
from lightning_conv.kernels.engine.coupled import coupled_gram
from lightning_conv.kernels.products.combinations import EachOutput
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.undisturbed import undisturbed


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def front(self, x):
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.front(x))
        return self.head(checkpoint(self.front, x, use_reentrant=self.reentrant))


def build(reentrant):
    torch.manual_seed(1)
    model = Checkpointed(reentrant).double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.train(), torch.randn(5, 3).double()


def coupled(model, inputs):
    with undisturbed(model):
        module = StatelessModule(model, batch_norm="batch")
        return coupled_gram(module, module.trainable, inputs, EachOutput(2), trace=False, precision="exact")[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
def test_checkpoints_change_no_kernel(mode, reentrant, snapshot):
    torch.set_float32_matmul_precision("highest")
    plain, inputs = build(None)
    model, _ = build(reentrant)
    before = snapshot(model)
    truth = (
        coupled(plain, inputs) if mode == "batch" else ntk_gram(plain, inputs, outputs="full", batch_norm=mode).matrix
    )
    found = (
        coupled(model, inputs) if mode == "batch" else ntk_gram(model, inputs, outputs="full", batch_norm=mode).matrix
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    operator = NTKOperator(model, inputs, batch_norm=mode)
    assert operator.jvp_method == "forward mode"
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-12, atol=1e-12)
    if mode != "batch":  # a float64 copy of a float32 model, which a recomputation would not find
        single = copy.deepcopy(model).float()
        copied = ntk_gram(single, inputs.float(), outputs="full", batch_norm=mode, precision="certified").matrix
        torch.testing.assert_close(copied, truth, rtol=1e-4, atol=1e-4)
    assert snapshot(model) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_again_afterwards(reentrant):
    model, inputs = build(reentrant)
    calls = []
    model.first.register_forward_hook(lambda module, args, output: calls.append(1))
    with undisturbed(model):
        pass
    model(inputs.requires_grad_()).sum().backward()
    assert len(calls) == 2
