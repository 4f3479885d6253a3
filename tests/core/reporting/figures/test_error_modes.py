"""The error by the eigenvectors of the first kernel: projections onto spaces, over the first error."""

import math

import numpy as np
import pytest
import torch

from lightning_conv.reporting.figures.error_modes import mode_components, mode_groups, plot_error_modes
from lightning_conv.reporting.log_steps import LogSteps

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("count", [1, 2, 3, 12, 64, 200])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_groups_cover_every_eigenvector_once_and_those_below_the_error_together(count, part):
    below = int(part * count)
    groups = mode_groups(count, below)
    assert [rank for first, last in groups for rank in range(first, last + 1)] == list(range(1, count + 1))
    if below:
        assert groups[-1] == (count - below + 1, count)


@pytest.mark.parametrize("columns", [1, 3])
def test_components_are_the_lengths_of_projections(columns):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.eigh(root @ root.T)[1]
    residual = torch.randn(12, columns, generator=generator, dtype=torch.float64)
    groups = mode_groups(12, 4)
    found = mode_components(vectors, residual, groups)
    by_rank = vectors.flip(1)
    for (first, last), component in zip(groups, found.tolist(), strict=True):
        projector = sum(torch.outer(by_rank[:, k], by_rank[:, k]) for k in range(first - 1, last))
        assert component == pytest.approx(float((projector @ residual).norm()))
    assert float(found.square().sum()) == pytest.approx(float(residual.square().sum()))


@pytest.mark.parametrize("steps", [[0], [0, 10, 200], [0, 1, 10, 100, 1000, 10_000, 100_000]])
def test_lines_are_the_components_over_the_first_error(steps):
    groups, seen = mode_groups(64, 20), LogSteps()
    for step in steps:
        seen.note(step, [3.0 * 0.5**k * math.exp(-step * 1e-5 * (9 - k)) for k in range(len(groups))])
    figure = plot_error_modes(seen, groups, 20)
    first = float(seen.rows[0].norm())
    lines = figure.axes[0].lines
    for number, line in enumerate(lines[:-1]):
        np.testing.assert_allclose(line.get_ydata(), seen.rows[:, number] / first)
        np.testing.assert_array_equal(line.get_xdata(), steps)
    np.testing.assert_allclose(lines[-1].get_ydata(), seen.rows.norm(dim=1) / first)
    labels = [line.get_label() for line in lines]
    assert labels == ["1", "2\u20133", "4\u20137", "8\u201315", "16\u201331", "32\u201344", "45\u201364*", "all"]
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    assert figure.axes[0].get_legend().get_window_extent(renderer).x1 <= 350


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_later_error_that_is_not_finite_is_a_gap_and_a_first_one_is_said(bad):
    seen = LogSteps()
    seen.note(0, [1.0, 1.0])
    seen.note(5, [bad, bad])
    seen.note(9, [0.5, 0.25])
    figure = plot_error_modes(seen, [(1, 1), (2, 2)])
    figure.canvas.draw()
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, False]
    first = LogSteps()
    first.note(0, [bad, bad])
    figure = plot_error_modes(first, [(1, 1), (2, 2)])
    figure.canvas.draw()
    assert "zero or not finite" in figure.axes[0].texts[0].get_text()


def test_another_number_of_groups_is_refused():
    seen = LogSteps()
    seen.note(0, [1.0])
    with pytest.raises(ValueError, match="2 components"):
        plot_error_modes(seen, [(1, 1), (2, 2)])
