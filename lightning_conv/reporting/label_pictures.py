"""``plot_labels``: pictures of the samples whose labels are the most suspicious."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.health.labels.suspicious_labels import TOP, LabelAudit
from lightning_conv.networks.inputs import Inputs

COLUMNS = 5
INCHES = 1.3
"""Side of a picture, with its title."""


def are_pictures(inputs: Inputs) -> bool:
    """Return whether samples are images of one or three channels: (n, 1, height, width) or (n, 3, height, width).

    Args:
        inputs: The samples.
    """
    return isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3) and min(inputs.shape[2:]) > 1


def plot_labels(inputs: Tensor, audit: LabelAudit, *, count: int = TOP, numbers: Sequence[int] | None = None) -> Figure:
    """Show the most suspicious samples, each with its number, its label and the suggested one; the first one is on the upper left.

    The smallest value of each image is black and the largest one white.

    Args:
        inputs: Images, (n, 1 or 3, height, width).
        audit: Of the same samples.
        count: How many, at most.
        numbers: Number of each sample in the training set; None: those of the audit are shown.

    Returns:
        A figure of five columns.

    Raises:
        ValueError: The inputs are no images of one or three channels, or others than those of the audit.
    """
    if not are_pictures(inputs) or len(inputs) != audit.samples:
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; need ({audit.samples}, 1 or 3, height, width)")
    shown = audit.top(count)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * INCHES, rows * (INCHES + 0.3)), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.25 / (rows * (INCHES + 0.3)), hspace=0.25)
    FigureCanvasAgg(figure)
    for place, each in enumerate(shown, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        number = each.number if numbers is None else numbers[each.number]
        image = inputs[each.number].detach().cpu().double()
        low, high = image.min(), image.max()
        image = torch.nan_to_num((image - low) / (high - low).clamp(min=1e-300)).permute(1, 2, 0)
        axes.imshow((image[:, :, 0] if image.shape[2] == 1 else image).numpy(), cmap="gray", vmin=0, vmax=1)
        title = f"{number}: {each.given}" + (f", not {each.suggested}?" if each.given != each.suggested else "")
        axes.set_title(title, fontsize=7)
        axes.axis("off")
    return figure
