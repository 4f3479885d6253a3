"""Jacobians and kernels, slow and dense; the test files import them."""

import copy

import torch
from torch import nn


def train_mode(model):
    """A copy that trains, but for dropout."""
    twin = copy.deepcopy(model).double().train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return twin


def train_mode_rows(model, inputs):
    """J by one autograd.grad for each output of each sample, in train mode over the whole batch."""
    twin = train_mode(model)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    rows = []
    for output in twin(inputs.double()).flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
            )
        )
    return torch.stack(rows)


def reduced(full, samples, outputs):
    """The kernel that ``outputs`` asks for, of the full one, (n C, n C)."""
    blocks = full.reshape(samples, -1, samples, full.shape[0] // samples)
    return {"full": full, "trace": blocks.diagonal(dim1=1, dim2=3).sum(-1), "sum": blocks.sum((1, 3))}[outputs]


def reduced_rows(rows, samples, outputs):
    """The same of the rows of J, (n C, P)."""
    return reduced(rows @ rows.T, samples, outputs)


def assert_same(found, expected, tolerance=1e-9):
    """Each entry, to this share of the largest one."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
