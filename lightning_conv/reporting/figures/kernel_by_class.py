"""``plot_kernel_by_class``: the kernel as a picture, its samples sorted by their class."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.kernels.gram import KernelGram
from lightning_conv.reporting.figures.style import (
    CARD,
    Style,
    margins,
    new_figure,
    say,
    set_labels,
    set_title,
    style_axes,
)

MOST_SAMPLES = 512
"""More have less than a pixel each; they are thinned evenly within the sorted order."""

LEAST_BETWEEN = 0.07
"""Share of the side of the picture that the names of two classes are apart."""


def kernel_of_samples(gram: KernelGram) -> Tensor:
    """Return one number per pair of samples, (n, n): the kernel itself, and of the full one of C outputs the trace of each block.

    Args:
        gram: The kernel on one set of samples.
    """
    n, outputs = gram.n_samples, gram.n_outputs
    if gram.matrix.shape[0] == n:
        return gram.matrix
    return gram.matrix.reshape(n, outputs, n, outputs).diagonal(dim1=1, dim2=3).sum(-1)


def cosines_by_class(matrix: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`K_{ij} / \sqrt{K_{ii} K_{jj}}` with the samples sorted by class, and the classes in this order.

    Args:
        matrix: K, (n, n).
        labels: Class of each sample, (n,).

    Returns:
        The cosines, (n, n), NaN where a sample has a gradient of zero; the classes, (n,).
    """
    order = torch.argsort(labels, stable=True)
    sizes = matrix.diagonal().clamp(min=0).sqrt()
    found = matrix / torch.where(sizes > 0, sizes, torch.nan) / torch.where(sizes > 0, sizes, torch.nan)[:, None]
    return found[order][:, order].clamp(-1, 1).cpu(), labels[order]


def plot_kernel_by_class(matrix: Tensor, labels: Tensor, title: str = "Kernel by class", style: Style = CARD) -> Figure:
    """Draw the cosine of the gradients of every two samples, sorted by class, with a line between classes.

    Bright blocks on the diagonal are classes whose samples pull the outputs alike.

    Args:
        matrix: K, (n, n), see ``kernel_of_samples``.
        labels: Class of each sample, (n,), see ``class_labels``.
        title: Of the figure.
        style: Of what is drawn.

    Returns:
        A figure with one panel and the scale of its colours.

    Raises:
        ValueError: The number of labels is another one than that of samples.
    """
    if len(labels) != len(matrix):
        raise ValueError(f"labels: {len(labels)} for a kernel of {len(matrix)} samples; need one each")
    figure = new_figure(style=style)
    margins(figure, left=0.75, right=0.75)
    axes = figure.add_subplot()
    style_axes(axes, style, frame=("left", "bottom", "top", "right"))
    set_title(axes, title, style)
    cosines, classes = cosines_by_class(matrix, labels)
    if not bool(torch.isfinite(cosines).any()):
        say(axes, "The gradients of all samples are zero or not finite.", style)
        return figure
    if len(cosines) > MOST_SAMPLES:
        kept = torch.linspace(0, len(cosines) - 1, MOST_SAMPLES).round().long()
        cosines, classes = cosines[kept][:, kept], classes[kept]
    low = min(0.0, float(np.nanmin(cosines.numpy())))
    shown = axes.imshow(cosines.numpy(), cmap="viridis", vmin=low, vmax=1.0, interpolation="nearest", aspect="equal")
    starts = [0, *((classes[1:] != classes[:-1]).nonzero().flatten() + 1).tolist(), len(classes)]
    width = 0.7 if len(starts) <= 14 else 0.25
    for start in starts[1:-1]:
        axes.axhline(start - 0.5, color="#ffffff", linewidth=width)
        axes.axvline(start - 0.5, color="#ffffff", linewidth=width)
    middles = [(begin + end - 1) / 2 for begin, end in pairwise(starts)]
    named: list[tuple[float, str]] = []
    for middle, begin in zip(middles, starts, strict=False):
        if not named or middle - named[-1][0] >= len(classes) * LEAST_BETWEEN:
            named.append((middle, str(int(classes[begin]))))
    axes.set_yticks([middle for middle, _ in named], [name for _, name in named])
    axes.set_xticks([])
    count = len(middles)
    set_labels(axes, style, x=f"{len(matrix)} samples, {count} class{'es' if count > 1 else ''}", y="class")
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=style.legend, colors=style.ink, length=2)
    bar.set_label("cosine of gradients", fontsize=style.legend, color=style.ink, labelpad=2)
    return figure
