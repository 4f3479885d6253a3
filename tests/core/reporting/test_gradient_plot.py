"""One figure has the gradients and the updates of all layers, and stays readable with many of them."""

from __future__ import annotations

import itertools
import math

import pytest

from lightning_conv.health.layers.layer_gradients import LayerGradient
from lightning_conv.reporting.gradient_plot import extreme_layers, plot_layer_gradients
from lightning_conv.reporting.plots import MOST_BARS

FIFTY = [
    LayerGradient(
        f"blocks.{k}.attention.projection", 10.0 ** (-((k * 7) % 50) / 10), 0.0, 1e-3 * 2.0 ** ((k * 11) % 50 / 10)
    )
    for k in range(50)
]


def test_two_panels_have_a_bar_for_each_layer_and_the_share_of_zeros_beside_it():
    layers = [
        LayerGradient("a", 0.1, 0.25, 1e-3),
        LayerGradient("b", 10.0, 0.001, 1e-2),
        LayerGradient("", 1.0, 1.0, math.nan),
    ]
    figure = plot_layer_gradients(layers)
    norms, updates = figure.axes
    assert [bar.get_width() for bar in norms.patches] == [0.1, 10.0, 1.0]
    assert [bar.get_width() for bar in updates.patches] == [1e-3, 1e-2, 0.0]  # of the third one none is known
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    assert [text.get_text() for text in norms.texts] == ["25 % zeros", "100 % zeros"]
    assert [label.get_text() for label in norms.get_yticklabels()] == ["a", "b", "(the model)"]
    assert [text.get_text() for text in figure.texts] == ["Gradient and update of the layers"]


def test_where_no_update_is_known_there_is_one_panel():
    assert len(plot_layer_gradients([LayerGradient("a", 1.0, 0.0, math.nan)]).axes) == 1
    with pytest.raises(ValueError, match="layers: empty"):
        plot_layer_gradients([])


def test_of_fifty_layers_the_ends_are_kept_and_the_rest_is_counted():
    kept = extreme_layers(FIFTY)
    assert len(kept) == MOST_BARS
    assert kept == [each for each in FIFTY if each in kept]  # in their order
    for quantity in ("norm", "update"):
        ordered = sorted(FIFTY, key=lambda each: getattr(each, quantity))
        assert all(each in kept for each in (*ordered[:2], *ordered[-2:]))
    figure = plot_layer_gradients(FIFTY)
    assert [text.get_text() for text in figure.texts] == ["Gradient and update (38 of 50 left out)"]
    assert len(figure.axes[0].patches) == MOST_BARS


def test_all_names_can_be_read():
    figure = plot_layer_gradients(FIFTY)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    labels = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert min(box.x0 for box in labels) >= 0
    for above, below in itertools.pairwise(labels):
        assert not above.overlaps(below)


def test_layers_without_any_gradient_are_drawn():
    figure = plot_layer_gradients([LayerGradient("a", 0.0, 1.0, 0.0), LayerGradient("b", 0.0, 1.0, math.nan)])
    assert len(figure.axes) == 1
