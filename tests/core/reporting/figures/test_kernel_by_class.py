"""The kernel as a picture: cosines, sorted by class, with the borders of the classes."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.reporting.figures.kernel_by_class import kernel_of_samples, plot_kernel_by_class

pytestmark = pytest.mark.filterwarnings("error")


def kernel(n, seed=0):
    rows = torch.randn(n, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.T


@pytest.mark.parametrize(("n", "classes"), [(3, 2), (4, 1), (30, 3), (128, 10), (200, 50)])
def test_the_picture_is_the_cosines_of_the_samples_sorted_by_class(n, classes):
    matrix = kernel(n)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(1))
    figure = plot_kernel_by_class(matrix, labels)
    axes = figure.axes[0]
    order = sorted(range(n), key=lambda k: (int(labels[k]), k))
    expected = [[float(matrix[i, j] / (matrix[i, i] * matrix[j, j]).sqrt()) for j in order] for i in order]
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-12)
    sizes = [int((labels == c).sum()) for c in labels.unique()]
    borders = np.cumsum(sizes)[:-1] - 0.5
    drawn = sorted(line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1])
    np.testing.assert_allclose(drawn, borders)
    assert axes.get_xlabel() == f"{n} samples, {len(sizes)} class" + ("es" if len(sizes) > 1 else "")
    assert len(axes.get_yticks()) <= 16
    figure.canvas.draw()
    assert np.asarray(figure.canvas.buffer_rgba()).shape == (216, 350, 4)


def test_of_the_full_kernel_the_trace_of_each_block_is_drawn():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4)
    full = kernel_of_samples(ntk_gram(model, inputs, outputs="full"))
    trace = kernel_of_samples(ntk_gram(model, inputs, outputs="trace"))
    torch.testing.assert_close(full, trace, rtol=1e-5, atol=1e-8)


def test_a_sample_without_a_gradient_is_empty_and_no_gradient_at_all_is_said():
    matrix = kernel(4)
    matrix[2], matrix[:, 2] = 0.0, 0.0
    figure = plot_kernel_by_class(matrix, torch.zeros(4, dtype=torch.long))
    figure.canvas.draw()
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array())[2].all()
    for nothing in (torch.zeros(3, 3, dtype=torch.float64), torch.full((3, 3), torch.nan, dtype=torch.float64)):
        figure = plot_kernel_by_class(nothing, torch.zeros(3, dtype=torch.long))
        figure.canvas.draw()
        assert "zero or not finite" in figure.axes[0].texts[0].get_text().replace("\n", " ")


def test_large_kernels_are_thinned_and_other_labels_are_refused():
    labels = torch.arange(1100) % 3
    figure = plot_kernel_by_class(kernel(1100), labels)
    assert figure.axes[0].images[0].get_array().shape == (512, 512)
    assert "1100 samples" in figure.axes[0].get_xlabel()
    with pytest.raises(ValueError, match="labels: 2 for a kernel of 3"):
        plot_kernel_by_class(kernel(3), torch.zeros(2))
