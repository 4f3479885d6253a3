"""The spectrum is drawn down to its error, and what is below it is counted."""

import math
import re

import numpy as np
import pytest
import torch

from lightning_conv.linalg.spectrum import Bounded, Spectrum, matrix_spectrum
from lightning_conv.reporting.figures.spectrum import (
    geometric_ranks,
    plot_spectra,
    plot_spectrum_over_training,
    spectrum_row,
)
from lightning_conv.reporting.log_steps import LogSteps

pytestmark = pytest.mark.filterwarnings("error")


def spectrum(values, error):
    """A spectrum of these values, each of them known up to an error."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    ends = [Bounded(float(v), float(v) - error, float(v) + error, False, "given") for v in (ordered[0], ordered[-1])]
    return Spectrum(ordered, ends[0], ends[1], error)


def words(axes):
    return " ".join(text.get_text().replace("\n", " ") for text in axes.texts)


def curve(axes):
    return next(line for line in axes.lines if line.get_linestyle() == "-")


def render(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("n", [3, 4, 17, 64, 128, 200])
def test_what_is_below_the_error_is_counted_and_not_drawn_and_the_axis_reaches_to_n(n):
    generator = torch.Generator().manual_seed(n)
    values = (10 ** (4 - 12 * torch.rand(n, generator=generator, dtype=torch.float64))).tolist()
    values[0], values[1] = 0.0, 1e3
    axes = plot_spectra({"now": spectrum(values, 1e-3)}).axes[0]
    clear = sorted((v for v in values if v > 1e-3), reverse=True)
    np.testing.assert_allclose(curve(axes).get_ydata(), clear)
    np.testing.assert_array_equal(curve(axes).get_xdata(), range(1, len(clear) + 1))
    assert f"{n - len(clear)} of {n} below it" in words(axes)
    low, high = axes.get_xlim()
    assert low < 1 < n < high
    assert {1, n} <= set(axes.get_xticks())
    shade = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert shade.y1 == pytest.approx(1e-3)
    assert axes.get_ylim()[0] < 1e-3 < axes.get_ylim()[1]


def test_where_all_are_clear_there_is_no_shade():
    axes = plot_spectra({"now": spectrum([1.0, 2.0, 8.0], 1e-9)}).axes[0]
    assert not axes.patches
    assert not axes.texts
    np.testing.assert_allclose(curve(axes).get_ydata(), [8.0, 2.0, 1.0])


def test_two_spectra_are_counted_apart():
    figure = plot_spectra({"step 0": spectrum([0.0, 1.0, 2.0], 1e-3), "step 9": spectrum([0.0, 0.0, 2.0], 1e-2)})
    assert "step 0: 1 of 3 below it step 9: 2 of 3 below it" in words(figure.axes[0])


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([0.0, 0.0, 0.0], 0.0),
        ([1.0, 2.0], math.inf),
        ([-1.0, -0.5], 1e-9),
        ([0.0, 1.0], 0.0),
        ([1e-200, 1e200], 0.0),
        ([1.0], 1e-9),
    ],
)
def test_a_spectrum_without_clear_eigenvalues_says_so_and_extreme_ones_are_drawn(values, error):
    figure = plot_spectra({"now": spectrum(values, error)})
    below = sum(not v > error for v in values)
    assert render(figure).shape == (216, 350, 4)
    if below == len(values):
        assert f"{below} of {below} are below it" in words(figure.axes[0])
    elif below:
        assert f"{below} of {len(values)} below it" in words(figure.axes[0])


def test_the_floor_is_the_error_of_the_smallest_eigenvalue():
    found = matrix_spectrum(torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)))
    assert 0.0 <= found.floor < 1e-12
    assert found.floor == found.lambda_min.upper - found.lambda_min.value
    assert found.count_below_floor == 1
    with pytest.raises(ValueError, match="count_below_floor"):
        Spectrum(None, found.lambda_min, found.lambda_max, None).count_below_floor  # noqa: B018


@pytest.mark.parametrize("n", [1, 2, 3, 12, 64, 200])
def test_a_row_has_the_eigenvalues_of_the_ranks_of_powers_of_two_and_the_last_one(n):
    values = [1.0 / (k + 1) ** 2 for k in range(n)]
    row = spectrum_row(spectrum(values, 1e-4))
    ranks = [r for r in range(1, n + 1) if r == n or (r & (r - 1)) == 0]
    assert geometric_ranks(n) == ranks
    np.testing.assert_allclose(row[3:], [values[r - 1] for r in ranks])
    assert row[:3].tolist() == pytest.approx([n, 1e-4, sum(v <= 1e-4 for v in values)])


def over_training(measurements, n=64, error=1e-6):
    seen, spectra = LogSteps(), {}
    for number in range(measurements):
        step = 0 if not number else 10**number
        spectra[step] = spectrum([10.0 ** (2 - 0.3 * k * (1 + 0.1 * number)) for k in range(n)], error)
        seen.note(step, spectrum_row(spectra[step]))
    return seen, spectra


@pytest.mark.parametrize("measurements", [1, 3, 7])
def test_over_training_a_line_of_each_rank_ends_where_it_falls_below_the_error(measurements):
    seen, spectra = over_training(measurements)
    figure = plot_spectrum_over_training(seen)
    axes = figure.axes[0]
    for line, rank in zip(axes.lines, geometric_ranks(64), strict=True):
        assert line.get_label() == str(rank)
        assert list(line.get_xdata()) == list(spectra)
        expected = [float(each.eigenvalues.flip(0)[rank - 1]) for each in spectra.values()]
        np.testing.assert_allclose(line.get_ydata(), [v if v > 1e-6 else math.nan for v in expected])
    last_step, last = list(spectra.items())[-1]
    below = int((last.eigenvalues <= 1e-6).sum())
    assert words(axes) == f"below the error: {below} of 64 at step {last_step}"
    top = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1e-6)
    assert axes.get_yscale() == "log"
    assert render(figure).shape == (216, 350, 4)


def test_over_training_copes_with_nothing_clear_and_with_infinite_errors():
    for values, error in (([0.0, 0.0], 1e-9), ([1.0, 2.0], math.inf), ([math.nan, 1.0], 1e-9)):
        seen = LogSteps()
        row = spectrum_row(spectrum([1.0, 1.0], error))
        row[3:] = torch.tensor(values, dtype=torch.float64)
        seen.note(4, row)
        assert render(plot_spectrum_over_training(seen)).any()
    with pytest.raises(ValueError, match="seen: empty"):
        plot_spectrum_over_training(LogSteps())
    with pytest.raises(ValueError, match="spectra: empty"):
        plot_spectra({})


def test_the_background_is_opaque_and_the_text_has_the_contrast_of_text_on_it():
    image = render(plot_spectra({"now": spectrum([0.0, 1.0, 2.0], 1e-3)}))
    assert (image[..., 3] == 255).all()

    def luminance(color):
        parts = [int(part, 16) / 255 for part in re.findall("..", color[1:])]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    from lightning_conv.reporting.figures.style import CARD, COLORS

    back = luminance(CARD.background)
    assert (back + 0.05) / (luminance(CARD.ink) + 0.05) > 7
    assert all((back + 0.05) / (luminance(color) + 0.05) > 2.5 for color in COLORS)
