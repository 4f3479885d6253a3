"""Figures as TensorBoard gets them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lightning_conv import Bounded, Spectrum, kernel_spectrum
from lightning_conv.plots import new_figure, plot_spectra


def spectrum(*eigenvalues):
    return kernel_spectrum(torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)))


def drawn(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_figures_have_the_size_of_a_card():
    for figure in (new_figure(), plot_spectra({"now": spectrum(1.0, 2.0)})):
        assert tuple(figure.get_size_inches()) == (4.0, 3.2)
        assert figure.dpi == 100
        assert drawn(figure).shape == (320, 400, 4)


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
    assert sorted(shown) == sorted(v for v in eigenvalues if v > 0)


@pytest.mark.filterwarnings("error")
def test_copes_with_bounds_that_reach_zero():
    smallest = Bounded(1e-9, 0.0, 1e-6, False, "given")
    largest = Bounded(1.0, 1.0, 1.0, True, "given")
    assert drawn(plot_spectra({"now": Spectrum(torch.tensor([1e-9, 1.0]).double(), smallest, largest, 0.0)})).any()
