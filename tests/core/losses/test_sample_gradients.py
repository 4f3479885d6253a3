"""The gradient of each sample's own loss by its outputs, against autograd on batches of one."""

import pytest
import torch
from torch import nn

from lightning_conv.losses.sample_gradients import sample_gradients

OUTPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 3, 1, 2, 1, 0])


def each(loss_fn, outputs, targets):
    rows = []
    for i in range(len(outputs)):
        leaf = outputs[i : i + 1].clone().requires_grad_()
        rows += torch.autograd.grad(loss_fn(leaf, targets[i : i + 1]), leaf)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (nn.CrossEntropyLoss(), CLASSES),
        (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0])), CLASSES),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), reduction="sum"), CLASSES),
        (nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
        (nn.CrossEntropyLoss(), OUTPUTS.softmax(1).flip(0)),
        (nn.MSELoss(), OUTPUTS.flip(0)),
        (nn.L1Loss(reduction="sum"), OUTPUTS.flip(0)),
        (nn.HuberLoss(), OUTPUTS.flip(0)),
        (nn.BCEWithLogitsLoss(), (OUTPUTS > 0).float().flip(0)),
        (lambda u, y: (u.square().sum() + 1).log() * y.float().mean(), CLASSES + 1),
    ],
)
def test_it_is_the_gradient_of_a_batch_of_one(loss_fn, targets):
    found = sample_gradients(loss_fn, OUTPUTS, targets)
    assert found.shape == OUTPUTS.shape
    torch.testing.assert_close(found, each(loss_fn, OUTPUTS, targets), rtol=1e-5, atol=1e-7)


def test_positions_without_a_target_are_left_out_sample_by_sample():
    outputs, targets = OUTPUTS.reshape(3, 4, 2), torch.tensor([[0, 1], [3, -100], [2, 2]])
    found = sample_gradients(nn.CrossEntropyLoss(), outputs, targets)
    torch.testing.assert_close(found, each(nn.CrossEntropyLoss(), outputs, targets), rtol=1e-5, atol=1e-7)
    assert float(found[1, :, 1].abs().max()) == 0


@pytest.mark.parametrize(
    ("loss_fn", "targets", "says"),
    [
        (nn.CrossEntropyLoss(), CLASSES[:5], r"targets: shape \(5,\) for 6 samples"),
        (nn.MSELoss(reduction="none"), OUTPUTS, r"loss_fn: returned shape \(1, 4\) for 1 samples"),
        (lambda u, y: y.float().mean(), CLASSES, "does not depend on the outputs"),
        (lambda u, y: (u * torch.inf).sum(), CLASSES, "NaN or infinity"),
    ],
)
def test_losses_without_a_gradient_for_each_sample_are_refused(loss_fn, targets, says):
    with pytest.raises(ValueError, match=says):
        sample_gradients(loss_fn, OUTPUTS, targets)
