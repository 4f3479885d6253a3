"""Pictures show the most suspicious samples in order, grey or coloured, each scaled by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_conv.health.labels.audit_labels import audit_labels
from lightning_conv.reporting.label_pictures import are_pictures, plot_labels


@pytest.fixture
def audit():
    rows = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).double()
    return audit_labels(rows @ rows.T, torch.arange(24) % 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_the_top_in_their_order(audit, channels):
    images = torch.randn(24, channels, 6, 5) * 7
    figure = plot_labels(images, audit, count=6, numbers=list(range(100, 124)))
    assert len(figure.axes) == 6
    for axes, each in zip(figure.axes, audit.top(6), strict=True):
        assert axes.get_title().startswith(f"{100 + each.number}: {each.given}")
        assert ("not" in axes.get_title()) == (each.given != each.suggested)
        image = images[each.number].permute(1, 2, 0).double().numpy()
        expected = (image - image.min()) / (image.max() - image.min())
        assert np.allclose(axes.images[0].get_array(), expected[:, :, 0] if channels == 1 else expected)


def test_a_constant_image_is_drawn(audit):
    figure = plot_labels(torch.ones(24, 1, 4, 4), audit)
    assert len(figure.axes) == 20
    figure.canvas.draw()


def test_what_is_no_image_is_refused(audit):
    assert not are_pictures(torch.zeros(3, 2, 8, 8))
    assert not are_pictures({"x": torch.zeros(3, 1, 8, 8)})
    assert not are_pictures(torch.zeros(3, 3, 8, 1))
    with pytest.raises(ValueError, match=r"inputs: shape \(24, 8\)"):
        plot_labels(torch.zeros(24, 8), audit)
    with pytest.raises(ValueError, match=r"need \(24, 1 or 3"):
        plot_labels(torch.zeros(23, 1, 4, 4), audit)
