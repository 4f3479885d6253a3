"""Logarithmic axes with few ticks."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from lightning_conv.reporting.log_axis import tick_label, use_log_scale


def labels(low, high, *, narrow=False):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [low, high])
    use_log_scale(axes, "y", narrow=narrow)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    shown = [text for text, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if bottom <= at <= top]
    return [text.get_text() for text in shown]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1e-3, "10\u207b\u00b3"),
        (2e-5, "2\u00b710\u207b\u2075"),
        (0.5, "0.5"),
        (1000.0, "1000"),
        (1e12, "10\u00b9\u00b2"),
        (0.0, ""),
    ],
)
def test_label_of_a_tick(value, label):
    assert tick_label(value) == label


@pytest.mark.parametrize("limits", [(1e-9, 3.0), (2e-3, 0.4), (2.1, 4.4), (1.0, 1.01), (1e-300, 1e300), (3.0, 3.0)])
def test_every_axis_has_a_few_labels(limits):
    assert 2 <= len(labels(*limits)) <= 12


def test_many_decades_are_labelled_at_powers_of_ten():
    assert all(label.startswith("10") or set(label) <= set("0.1") for label in labels(1e-9, 3.0))
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "limits", [(1e-9, 3.0), (2e-3, 0.4), (1e-3, 8e-2), (2.1, 4.4), (1.0, 1.01), (3e-4, 9e-3), (1e-30, 1.0)]
)
def test_a_narrow_axis_has_no_more_labels_than_fit(limits):
    assert 1 <= len(labels(*limits, narrow=True)) <= 4
