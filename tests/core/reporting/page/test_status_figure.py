"""The one picture of a run: six panels with its numbers, or with the reason why there are none."""

import math
import re

import numpy as np
import pytest
from records import EVIL, series_of_run

from lightning_conv.reporting.page.status_figure import figure_as_svg, status_figure
from lightning_conv.reporting.series import Series


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def words(axes):
    return " ".join(text.get_text().replace("\n", " ") for text in axes.texts)


def test_the_lines_are_the_numbers_with_gaps_where_there_are_none():
    series = series_of_run()
    figure = status_figure(series, {"a": 0.75, "b": 0.25})
    for title, tag in (("lambda_min", "kernel/lambda_min"), ("Stability", "health/stability")):
        drawn = panel(figure, title).lines[0]
        known = np.array(series[tag].values)
        np.testing.assert_array_equal(np.isnan(drawn.get_ydata()), np.isnan(known))
        np.testing.assert_allclose(drawn.get_ydata(), known)
        np.testing.assert_array_equal(drawn.get_xdata(), series[tag].steps)
    assert panel(figure, "lambda_min").get_yscale() == "log"
    assert [line.get_ydata()[0] for line in panel(figure, "Stability").lines][-1] == 1.0
    assert sorted(bar.get_width() for bar in panel(figure, "Share").patches) == [0.25, 0.75]


def test_the_bounds_are_a_band_that_reaches_down_where_the_lower_one_is_not_positive():
    series = series_of_run()
    axes = panel(status_figure(series, {}), "lambda_min")
    corners = axes.collections[0].get_paths()[0].vertices
    upper = dict(zip(series["kernel/lambda_min_upper"].steps, series["kernel/lambda_min_upper"].values, strict=True))
    for step in (0, 200):
        assert corners[corners[:, 0] == step, 1].max() == pytest.approx(upper[step])
    assert corners[corners[:, 0] == 0, 1].min() > 0


def test_panels_without_numbers_say_why():
    figure = status_figure({}, {}, why={"stability": "gradients are clipped"})
    assert words(panel(figure, "Stability")) == "Not measured: gradients are clipped."
    assert "KernelStability" in words(panel(figure, "Kernel"))
    assert "per_layer" in words(panel(figure, "Share"))
    assert all(words(axes) for axes in figure.axes)


def test_a_gap_takes_the_place_of_the_forecast():
    series = series_of_run() | {"guard/gap": Series().extend([(300, 0.5), (399, 0.1)])}
    titles = {axes.get_title(loc="left") for axes in status_figure(series, {}).axes}
    assert "Gap to the infimum" in titles
    assert "Forecast" not in titles


def test_of_many_layers_the_largest_are_drawn_and_counted():
    shares = {f"layer.{k}": (k + 1) / 1275 for k in range(50)}
    axes = panel(status_figure({}, shares), "Share")
    assert axes.get_title(loc="left").endswith("(12 of 50)")
    assert min(bar.get_width() for bar in axes.patches) == pytest.approx(39 / 1275)


@pytest.mark.parametrize("name", [EVIL, "$\\frac{", "_hidden", "a\nb\x00c", ""])
def test_names_are_no_formulas_and_no_markup(name):
    series = series_of_run() | {f"loss{name}": Series().extend([(0, 1.0), (10, 0.5)])}
    svg = figure_as_svg(status_figure(series, {name: 1.0}), title=name)
    assert "<script" not in svg
    assert not re.search(r"[\x00-\x08]", svg)


def test_the_picture_takes_the_colour_of_the_page_and_is_the_same_each_time():
    draw = lambda: figure_as_svg(status_figure(series_of_run(), {"a": 1.0}), salt="x")  # noqa: E731
    svg = draw()
    assert svg == draw()
    assert svg.startswith("<svg ")
    assert svg.count("currentColor") > 20
    assert "#000000" not in svg
    assert "http" not in svg
    assert len(svg) < 200_000
    others = set(re.findall(r'id="([^"]+)"', figure_as_svg(status_figure(series_of_run(), {"a": 1.0}), salt="y")))
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    assert referenced <= set(re.findall(r'id="([^"]+)"', svg))
    assert not referenced & others


def test_single_points_and_constant_and_non_positive_values_are_drawn(recwarn):
    for values in ([(5, 1.0)], [(0, 0.0), (5, 0.0)], [(0, -1.0), (5, -2.0)], [(0, math.nan)]):
        series = {tag: Series().extend(values) for tag in series_of_run()}
        assert "<svg" in figure_as_svg(status_figure(series, {"a": 0.0}))
    assert not [each for each in recwarn if "matplotlib" in str(each.filename)]


def test_the_labels_of_the_ticks_are_those_of_the_figure():
    series = {"guard/gap": Series().extend([(step, 0.0621 - 0.0001 * step) for step in range(80)])}
    figure = status_figure(series, {})
    svg = figure_as_svg(figure)
    axes = panel(figure, "Gap")
    low, high = axes.get_ylim()
    labels = [each.get_text() for each in axes.get_yticklabels() if low <= each.get_position()[1] <= high]
    assert len(set(labels)) == len(labels) > 2
    assert any(len(label) > 4 for label in labels)
    assert [label for label in labels if f">{label}<" not in svg.replace(" ", "").replace("\n", "")] == []


def test_no_label_of_a_panel_lies_on_the_next_panel():
    series = series_of_run() | {"guard/gap": Series().extend([(0, 0.0615), (80, 0.0541)])}
    figure = status_figure(series, {"a": 1.0})
    figure.canvas.draw()
    beside = next(axes for axes in figure.axes if axes.get_ylabel().startswith("alignment"))
    ends = beside.yaxis.label.get_window_extent().x1
    assert ends < min(each.get_window_extent().x0 for each in panel(figure, "Gap").get_yticklabels() if each.get_text())
