"""One table of colours has what every layer does, with readable names of three layers and of fifty."""

import itertools
import math

import numpy as np
import pytest

from lightning_conv.reporting.figures.layer_map import (
    MOST_ROWS,
    LayerValues,
    group_layers,
    layer_row,
    plot_layer_map,
)
from lightning_conv.reporting.log_steps import LogSteps

pytestmark = pytest.mark.filterwarnings("error")


def names_of(count):
    return [f"model.encoder.layers.{k}.attention.output_projection" for k in range(count)]


def value(layer, step):
    return LayerValues(0.5 / (1 + layer), math.exp(-layer - step / 100), layer % 5, 10)


def seen_at(steps, names):
    groups, seen = group_layers(names), LogSteps()
    for step in steps:
        seen.note(step, layer_row(groups, {name: value(k, step) for k, name in enumerate(names)}))
    return groups, seen


@pytest.mark.parametrize("steps", [[0], [0, 10, 100], [0, 1, 2, 5, 10, 100, 1000]])
@pytest.mark.parametrize("layers", [1, 3, 10, 50])
def test_the_tables_are_the_numbers_and_every_name_can_be_read(layers, steps):
    names = names_of(layers)
    groups, seen = seen_at(steps, names)
    figure = plot_layer_map(seen, [name for name, _ in groups])
    tables = [axes.images[0].get_array() for axes in figure.axes]
    for row, column in itertools.product(range(layers), range(len(steps))):
        known = value(row, steps[column])
        expected = (known.share, known.gradient, known.dead / known.units)
        assert [float(table[row, column]) for table in tables] == pytest.approx(expected)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["share of trace", "gradient norm", "dead units"]
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())
    assert image.shape[1] == 350
    assert image.shape[0] <= 1000
    renderer = figure.canvas.get_renderer()
    labels = figure.axes[0].texts
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert len(labels) == layers
    assert min(box.x0 for box in boxes) >= 0
    assert min(label.get_fontsize() for label in labels) >= 5.5  # 8 pixels
    for above, below in itertools.pairwise(boxes):
        assert above.y0 >= below.y1 - 2.0  # the box of a text is higher than its letters
    assert len({label.get_text() for label in labels}) == layers


def test_groups_add_up_shares_and_units_and_take_the_root_of_squared_norms():
    names = [f"blocks.{block}.{part}" for block in range(40) for part in ("attention.q", "attention.v", "mlp")]
    groups = group_layers(names)
    assert len(groups) <= MOST_ROWS
    assert [each for _, members in groups for each in members] == names
    values = {name: LayerValues(0.01 * k, float(k), k % 3, 4) for k, name in enumerate(names)}
    row = layer_row(groups, values).reshape(3, len(groups))
    for number, (_, members) in enumerate(groups):
        shares, norms = [values[m].share for m in members], [values[m].gradient for m in members]
        assert float(row[0, number]) == pytest.approx(sum(shares))
        assert float(row[1, number]) == pytest.approx(math.hypot(*norms))
        dead = sum(values[m].dead for m in members) / sum(values[m].units for m in members)
        assert float(row[2, number]) == pytest.approx(dead)


@pytest.mark.parametrize(
    "names", [[f"layer{k}" for k in range(500)], [f"net.{k}" for k in range(500)], [f"a.b.{k}.c" for k in range(500)]]
)
def test_hundreds_of_layers_without_a_common_module_are_put_together_with_their_neighbours(names):
    groups = group_layers(names)
    assert MOST_ROWS / 4 < len(groups) <= MOST_ROWS
    assert [each for _, members in groups for each in members] == names


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_values_that_are_zero_or_not_finite_are_empty(bad):
    names = ["a", "b"]
    seen = LogSteps()
    seen.note(0, layer_row(group_layers(names), {"a": LayerValues(bad, bad, 1, 2), "b": LayerValues(0.5, 2.0, 0, 2)}))
    seen.note(1, layer_row(group_layers(names), {"b": LayerValues(0.5, 2.0, 0, 2)}))
    figure = plot_layer_map(seen, names)
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        assert np.ma.getmaskarray(axes.images[0].get_array()).tolist() == [[True, True], [False, False]]


def test_a_quantity_of_which_nothing_is_known_has_no_table():
    seen = LogSteps()
    seen.note(0, layer_row(group_layers(["a"]), {"a": LayerValues(share=1.0)}))
    assert [axes.get_title(loc="left") for axes in plot_layer_map(seen, ["a"]).axes] == ["share of trace"]
    nothing = LogSteps()
    nothing.note(0, layer_row(group_layers(["a"]), {}))
    figure = plot_layer_map(nothing, ["a"])
    figure.canvas.draw()
    assert len(figure.axes) == 1
    with pytest.raises(ValueError, match="need 6 numbers"):
        plot_layer_map(seen, ["a", "b"])


def test_names_are_no_formulas():
    names = ["$\\frac{", "a\nb\x00c", ""]
    _, seen = seen_at([0, 1], names)
    plot_layer_map(seen, names).canvas.draw()
