"""Norms, zeros and updates of layers are those that are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_conv.health.layers.layer_gradients import layer_gradients, zero_share

GRADIENTS = {
    "trunk.0.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]]),
    "trunk.0.bias": torch.tensor([0.0, 12.0]),
    "scale": torch.tensor([2.0]),
    "head.weight": torch.tensor([[0.0, 0.0]]),
}
WEIGHTS = {
    "trunk.0.weight": torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
    "trunk.0.bias": torch.tensor([2.0, 1.0]),
    "scale": torch.tensor([0.0]),
    "head.weight": torch.tensor([[0.6, 0.8]]),
}
UPDATES = {
    "trunk.0.weight": torch.tensor([[0.02, 0.0], [0.0, 0.01]]),
    "trunk.0.bias": torch.tensor([0.02, 0.0]),
    "scale": torch.tensor([1.0]),
}


def test_layers_have_the_norms_of_all_of_their_weights_together():
    trunk, scale, head = layer_gradients(GRADIENTS, WEIGHTS, UPDATES)
    assert [each.name for each in (trunk, scale, head)] == ["trunk.0", "", "head"]
    assert trunk.norm == pytest.approx(13)  # 3, 4, 12
    assert trunk.zeros == pytest.approx(3 / 6)
    assert trunk.update == pytest.approx(0.03 / 3)  # |(0.02, 0.01, 0.02)| over |(1, 1, 1, 1, 2, 1)|
    assert scale.norm == 2
    assert math.isnan(scale.update)  # the weight is zero
    assert (head.norm, head.zeros) == (0, 1)
    assert math.isnan(head.update)  # no update is known


def test_the_share_of_zeros_counts_entries():
    assert zero_share(GRADIENTS) == pytest.approx(5 / 9)
    assert math.isnan(zero_share({}))


def test_gradients_without_their_weights_are_refused():
    g = {"a.w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"weights: none of a\.w, of which gradients= has the gradient"):
        layer_gradients(g, {}, {})
    with pytest.raises(TypeError, match="updates: None; need tensors by the name of the weight"):
        layer_gradients(g, g, None)
