"""The margins are those of regressions that leave each sample out in turn, and find labels that were changed."""

from __future__ import annotations

import pytest
import torch

from lightning_conv.health.labels.label_margins import gaussian_kernel, label_margins


def blobs(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centers = 2.5 * torch.randn(3, 5, generator=generator)
    return centers[labels] + torch.randn(count, 5, generator=generator), labels


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_they_are_those_of_regressions_without_each_sample(ridge):
    x, labels = blobs(20)
    kernel = gaussian_kernel(x)
    found = label_margins(kernel, labels, ridge=ridge)
    y = torch.nn.functional.one_hot(labels, 3).double()
    for i in range(20):
        rest = [j for j in range(20) if j != i]
        weights = torch.linalg.solve(
            kernel[rest][:, rest] + ridge * torch.eye(19, dtype=torch.float64), (y - y.mean(0))[rest]
        )
        scores = kernel[i, rest] @ weights + y.mean(0)
        others = [float(scores[c]) for c in range(3) if c != labels[i]]
        assert float(found.margins[i]) == pytest.approx(float(scores[labels[i]]) - max(others), abs=1e-9)
        assert int(found.suggested[i]) == int(scores.argmax())


def test_the_ridge_is_the_one_of_the_least_error():
    x, labels = blobs()
    kernel = gaussian_kernel(x)
    best = label_margins(kernel, labels)
    assert all(best.error <= label_margins(kernel, labels, ridge=each).error + 1e-12 for each in (1e-6, 0.01, 0.1, 1.0))


def test_changed_labels_come_first():
    x, labels = blobs()
    wrong = labels.clone()
    wrong[[5, 17, 40]] = (labels[[5, 17, 40]] + 1) % 3
    found = label_margins(gaussian_kernel(x), wrong + 7)
    assert set(found.suspicious[:3].tolist()) == {5, 17, 40}
    assert torch.equal(found.suggested[[5, 17, 40]], labels[[5, 17, 40]] + 7)


@pytest.mark.parametrize(
    ("kernel", "labels", "says"),
    [
        (torch.eye(4), torch.zeros(3), "for 3 labels"),
        (torch.eye(4), torch.zeros(4), "one class only"),
        (torch.zeros(4, 4), torch.arange(4), "zero"),
        (torch.full((4, 4), torch.nan), torch.arange(4), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(kernel, labels, says):
    with pytest.raises(ValueError, match=says):
        label_margins(kernel, labels)


@pytest.mark.parametrize("ridge", [-1.0, 0.0, float("nan"), float("inf"), "a"])
def test_a_ridge_that_is_none_is_refused_by_its_value(ridge):
    with pytest.raises(ValueError, match=f"ridge: {ridge!r}; need a finite number above 0"):
        label_margins(torch.eye(4), torch.tensor([0, 0, 1, 1]), ridge=ridge)


def test_what_is_no_kernel_and_are_no_labels_is_refused():
    kernel, labels = torch.eye(6), torch.arange(6) % 2
    with pytest.raises(TypeError, match=r"kernel: None; need a matrix \(n, n\)"):
        label_margins(None, labels)
    with pytest.raises(TypeError, match=r"labels: None; need class numbers, \(n,\)"):
        label_margins(kernel, None)
    with pytest.raises(TypeError, match=r"inputs: None; need samples"):
        gaussian_kernel(None)
    for inputs in (torch.zeros(3), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"inputs: shape .*; need \(n, ...\) with n of at least 2"):
            gaussian_kernel(inputs)
