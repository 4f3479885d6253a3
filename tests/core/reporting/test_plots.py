"""Figures as TensorBoard receives them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lightning_conv import Bounded, Spectrum, kernel_spectrum
from lightning_conv.reporting.plots import new_figure, plot_label_projection, plot_layers, plot_spectra


def spectrum(*eigenvalues):
    return kernel_spectrum(torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)))


def drawn(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_figures_have_the_size_of_a_card():
    for figure in (new_figure(), plot_spectra({"now": spectrum(1.0, 2.0)})):
        assert figure.dpi == 100
        assert drawn(figure).shape == (216, 350, 4)  # what TensorBoard shows without scaling


def test_drawing_leaves_pyplot_alone():
    figures, settings = plt.get_fignums(), dict(plt.rcParams)
    drawn(plot_spectra({"now": spectrum(1.0, 2.0)}))
    assert plt.get_fignums() == figures
    assert dict(plt.rcParams) == settings


def test_lines_are_the_eigenvalues_in_descending_order():
    axes = plot_spectra({"step 0": spectrum(1e-3, 5.0, 1.0), "step 9": spectrum(2.0, 3.0)}).axes[0]
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    np.testing.assert_allclose(lines[0].get_ydata(), [5.0, 1.0, 1e-3])
    np.testing.assert_array_equal(lines[0].get_xdata(), [1, 2, 3])
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 0", "step 9"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eigenvalues", [(-1e-17, 0.0, 1.0, 2.0), (0.0, 0.0), (-2.0, -1.0), (1.0,)])
def test_copes_with_eigenvalues_that_are_not_positive(eigenvalues):
    figure = plot_spectra({"now": spectrum(*eigenvalues)})
    image = drawn(figure)
    assert image[..., :3].min() < 128  # something was drawn
    shown = figure.axes[0].get_lines()[0].get_ydata()
    assert sorted(shown) == sorted(v for v in eigenvalues if v > 1e-10)


@pytest.mark.filterwarnings("error")
def test_copes_with_bounds_that_reach_zero():
    smallest = Bounded(1e-9, 0.0, 1e-6, False, "given")
    largest = Bounded(1.0, 1.0, 1.0, True, "given")
    assert drawn(plot_spectra({"now": Spectrum(torch.tensor([1e-9, 1.0]).double(), smallest, largest, 0.0)})).any()


def bounded(value, lower=None, upper=None):
    return Bounded(value, value if lower is None else lower, value if upper is None else upper, True, "given")


def test_layers_are_bars_of_their_share_and_their_smallest_eigenvalue():
    shares = {"first": 0.7, "norm": 0.0, "a.very.long.name.of.a.layer": 0.3}
    smallest = {"first": bounded(2.0, 1.9, 2.1), "norm": bounded(0.0, 0.0, 1e-6)}
    figure = plot_layers(shares, smallest, bounded(3.0))
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["first", "norm", "a.very.l..f.a.layer"]
    by_row = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in left.patches}
    assert by_row == {2: 0.7, 1: 0.0, 0: 0.3}
    filled = [bar for bar in right.patches if bar.get_facecolor()[3] > 0]
    hollow = [bar for bar in right.patches if bar.get_facecolor()[3] == 0]
    assert [bar.get_width() for bar in filled] == [2.0, 0.0]  # of the third one nothing is known
    assert [bar.get_width() for bar in hollow] == [1e-6]
    assert left.get_xscale() == right.get_xscale() == "log"
    assert right.get_xlim()[0] < 1e-6
    assert right.get_xlim()[1] > 3.0
    assert drawn(figure).shape == (216, 350, 4)


def test_of_many_layers_those_with_most_are_drawn_in_the_networks_order():
    shares = {f"layer{k}": 1.0 + (k % 7) for k in range(40)}
    smallest = {f"layer{k}": bounded(1e-3 if k == 7 else 0.0) for k in range(40)}  # the best has the smallest share
    for figure in (plot_layers(shares), plot_layers(shares, smallest)):
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(names) == 12
        assert names == sorted(names, key=lambda name: int(name.removeprefix("layer")))
        assert [text.get_text() for text in figure.texts] == ["Layers in the kernel (28 of 40 left out)"]
    assert "layer7" in names


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("smallest", [None, {}, {"": bounded(0.0)}])
def test_copes_with_a_single_layer_of_no_name_and_no_eigenvalue(smallest):
    figure = plot_layers({"": 1.0}, smallest)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "(the model)"
    assert drawn(figure).any()


def test_every_projection_is_drawn_however_many_there_are():
    shares = {str(k): torch.tensor([0.5, 0.5]) for k in range(5)}
    above, _ = plot_label_projection(shares, [(0, 1.0, 1.0), (1, 0.5, 0.4)]).axes
    assert [line.get_label() for line in above.lines] == list(shares)
