"""A loss that is known only as a function of the outputs: is it a sum over the samples, and is it the one that it is said to be?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_conv.losses.of_outputs import coupling, difference, evaluate, settings

SAMPLES, CLASSES = 8, 3
LABELS = torch.arange(SAMPLES) % CLASSES
TARGETS = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1))
OUTPUTS = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(2))


def points_of(loss, outputs=OUTPUTS):
    return [point for point in settings(loss, outputs) if point.finite]


ALIKE = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS, lambda u: F.cross_entropy(u, LABELS)),
    "cross-entropy by hand": (
        nn.CrossEntropyLoss(),
        LABELS,
        lambda u: (u.logsumexp(1) - u[range(SAMPLES), LABELS]).mean(),
    ),
    "nll": (nn.CrossEntropyLoss(), LABELS, lambda u: F.nll_loss(u.log_softmax(1), LABELS)),
    "squares": (nn.MSELoss(), TARGETS, lambda u: ((u - TARGETS) ** 2).mean()),
    "squares, otherwise": (nn.MSELoss(), TARGETS, lambda u: (u - TARGETS).norm() ** 2 / u.numel()),
    "Huber": (nn.HuberLoss(), TARGETS, lambda u: F.huber_loss(u, TARGETS)),
    "absolute": (nn.L1Loss(), TARGETS, lambda u: (u - TARGETS).abs().mean()),
    "sum": (nn.MSELoss(reduction="sum"), TARGETS, lambda u: ((u - TARGETS) ** 2).sum()),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_one_loss_in_two_ways_of_writing_is_one_loss(name, size):
    loss_fn, targets, step = ALIKE[name]
    points = points_of(step, size * OUTPUTS)
    assert difference(points, lambda u: loss_fn(u, targets.to(u) if targets.is_floating_point() else targets)) == ""
    assert coupling(step, points) == ""


OTHER = {
    "smoothed": lambda u: F.cross_entropy(u, LABELS, label_smoothing=1e-3),
    "shifted labels": lambda u: F.cross_entropy(u, (LABELS + 1) % CLASSES),
    "scaled": lambda u: 1.0001 * F.cross_entropy(u, LABELS),
    "flooded": lambda u: (F.cross_entropy(u, LABELS) - 0.01).abs() + 0.01,
    "focal": lambda u: ((1 - (p := u.softmax(1)[range(SAMPLES), LABELS])) ** 2 * -p.log()).mean(),
    "with a term of its own": lambda u: F.cross_entropy(u, LABELS) + 1e-4 * u.square().mean(),
    "clipped where it is large": lambda u: F.cross_entropy(u, LABELS).clamp(max=2.0),
    "the same value and another gradient": lambda u: (
        F.cross_entropy(u, LABELS) + (r := 0.1 * u.square().mean()) - r.detach()
    ),
    "one sample left out": lambda u: F.cross_entropy(u[1:], LABELS[1:]),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_loss_is_told_apart(name):
    assert difference(points_of(OTHER[name]), lambda u: F.cross_entropy(u, LABELS)) != ""


def hardest(u):
    return F.cross_entropy(u, LABELS, reduction="none").topk(3).values.mean()


COUPLED = {
    "contrastive": lambda u: F.cross_entropy(F.normalize(u) @ F.normalize(u).T, torch.arange(SAMPLES)),
    "the mean of the batch": lambda u: ((u - u.mean(0) - TARGETS) ** 2).mean(),
    "the hardest samples": hardest,
    "the worst sample": lambda u: F.mse_loss(u, TARGETS, reduction="none").mean(1).max(),
    "pairs": lambda u: F.relu(1 - (u[:, None] - u[None])).mean(),
    "a product": lambda u: F.mse_loss(u, TARGETS) + 1e-3 * (u[0] * u[1]).sum(),
    "a square root": lambda u: F.mse_loss(u, TARGETS).sqrt(),
    "divided by the largest": lambda u: F.mse_loss(u, TARGETS) / u.abs().max().detach(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_couple_in_the_loss_are_found(name):
    assert "couples the samples" in coupling(COUPLED[name], points_of(COUPLED[name]))


def test_class_weights_and_ignored_labels_couple_nothing():
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), ignore_index=2)
    assert coupling(lambda u: weighted(u, LABELS), points_of(lambda u: weighted(u, LABELS))) == ""


def test_a_loss_that_detaches_the_outputs_has_no_gradient():
    with pytest.raises(ValueError, match="no gradient by the outputs"):
        evaluate(lambda u: u.detach().square().mean(), OUTPUTS)


def test_the_steps_down_come_close_to_the_infimum():
    values = [point.value for point in settings(lambda u: F.mse_loss(u, TARGETS), OUTPUTS)]
    assert min(values) < 1e-3 * values[0]
