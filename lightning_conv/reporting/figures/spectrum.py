"""``plot_spectra``, ``plot_spectrum_over_training``: the eigenvalues of a kernel down to their error, now and by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.reporting.figures.style import (
    CARD,
    COLORS,
    SEQUENCE,
    Style,
    finish,
    fit_steps,
    legend,
    margins,
    new_figure,
    plain,
    say,
    set_title,
    style_axes,
)
from lightning_conv.reporting.log_steps import LogSteps

SHADE = 0.16
"""Opacity of the shade over what is below the error."""

SPARE = 0.08
"""Share of the logarithmic axis that is left free above the largest value, and of the shade below the error."""

NOTHING_CLEAR = "No eigenvalue stands clear of its error: {below} of {count} are below it."
"""What a spectrum says of which nothing is known but its error."""


def geometric_ranks(count: int) -> list[int]:
    """Return the ranks 1, 2, 4, ... and the last one, which tell a spectrum of any size.

    Args:
        count: Number n of eigenvalues.

    Example:
        >>> geometric_ranks(12)
        [1, 2, 4, 8, 12]
    """
    ranks = [2**power for power in range(count.bit_length()) if 2**power <= count]
    return ranks if not ranks or ranks[-1] == count else [*ranks, count]


def spectrum_row(spectrum: Spectrum) -> Tensor:
    """Return what ``plot_spectrum_over_training`` keeps of a spectrum.

    Args:
        spectrum: With all of its eigenvalues.

    Returns:
        (3 + number of ranks,), float64: n, the error, how many eigenvalues are below it, and those of the ``geometric_ranks``, in
        descending order.

    Raises:
        ValueError: Only the two extreme eigenvalues are known.
    """
    values = spectrum.all_eigenvalues("spectrum_row").flip(0).double().cpu()
    ranks = torch.tensor(geometric_ranks(len(values))) - 1
    head = torch.tensor([len(values), spectrum.floor, spectrum.count_below_floor], dtype=torch.float64)
    return torch.cat([head, values[ranks]])


def plot_spectra(spectra: Mapping[str, Spectrum], title: str = "Spectrum of the kernel", style: Style = CARD) -> Figure:
    """Plot eigenvalues in descending order on a logarithmic axis, one line per spectrum, which ends where its error begins.

    What is at or below the error is not drawn, since it is rounding. The error is the top of a shade that says how many eigenvalues are in
    it; the horizontal axis reaches to the last one all the same. An error bar has the bounds of the smallest eigenvalue, if it is clear.

    Args:
        spectra: The spectra by label, at least one.
        title: Of the figure.
        style: Of what is drawn.

    Returns:
        A figure with one panel, in the units of the kernel: squared change of an output per squared change of the weights.

    Raises:
        ValueError: A spectrum does not have all of its eigenvalues, or there is none.
    """
    if not spectra:
        raise ValueError("spectra: empty; need at least one")
    figure = new_figure(style=style)
    axes = figure.add_subplot()
    style_axes(axes, style)
    set_title(axes, title, style)
    floors: list[float] = []
    drawn: list[float] = []
    words: list[str] = []
    for (label, spectrum), color in zip(spectra.items(), COLORS, strict=False):
        values = spectrum.all_eigenvalues("plot_spectra").flip(0).cpu().numpy()
        floor, below = spectrum.floor, spectrum.count_below_floor
        clear = values[: len(values) - below]
        dots = "o" if len(values) <= 40 else ""
        axes.plot(
            np.arange(1, len(clear) + 1),
            clear,
            color=color,
            linewidth=1.3,
            marker=dots,
            markersize=2.5,
            label=plain(label),
        )
        if not below:
            smallest = spectrum.lambda_min
            if smallest.value > 0 and math.isfinite(smallest.upper):
                bars = [[max(smallest.value - smallest.lower, 0.0)], [max(smallest.upper - smallest.value, 0.0)]]
                axes.errorbar(
                    [len(values)], [smallest.value], yerr=bars, color=color, capsize=2, elinewidth=0.9, fmt="none"
                )
        else:
            floors.append(floor)
            of = f"{label}: " if len(spectra) > 1 else ""
            words.append(f"{of}{below} of {len(values)} below it")
        drawn += clear.tolist()
    count = max(len(each.all_eigenvalues()) for each in spectra.values())
    if not drawn:
        below = max(each.count_below_floor for each in spectra.values())
        say(axes, NOTHING_CLEAR.format(below=below, count=count), style)
        return figure
    if words:
        known = [each for each in floors if math.isfinite(each) and each > 0]
        _shade(axes, max(known, default=min(drawn) / 10), max(drawn), words, style)
    axes.set_xlim(1 - 0.03 * count, count * 1.03)
    finish(axes, style, log=True, x=f"index, 1 to {count}", y="eigenvalue")
    axes.set_xticks(_whole_ticks(count))
    if len(spectra) > 1:
        legend(axes, style)
    return figure


def _shade(axes: Axes, floor: float, highest: float, words: Sequence[str], style: Style) -> None:
    """Shade what is below the error, and say how many eigenvalues are."""
    decades = max(math.log10(highest / floor), 1.0) if highest > floor else 1.0
    low = floor / 10 ** ((0.2 + 0.1 * len(words)) * decades)
    axes.axhspan(low, floor, color=style.ink, alpha=SHADE, linewidth=0)
    axes.set_ylim(low, max(highest, floor) * 10 ** (SPARE * decades))
    axes.text(
        0.02,
        0.02,
        "error of the kernel\n" + "\n".join(words),
        transform=axes.transAxes,
        va="bottom",
        fontsize=style.legend,
        color=style.ink,
        parse_math=False,
    )


def _whole_ticks(count: int) -> list[int]:
    """Return at most six round numbers from 1 to ``count``, both included."""
    if count <= 6:
        return list(range(1, count + 1))
    width = max(10 ** math.floor(math.log10(count / 4)), 1)
    width = next(width * times for times in (1, 2, 5, 10) if count / (width * times) <= 5)
    return [1, *range(width, count - width // 2, width), count]


def plot_spectrum_over_training(seen: LogSteps, title: str = "Spectrum over training", style: Style = CARD) -> Figure:
    """Plot eigenvalues against the step on a logarithmic axis, one line for each of the ranks 1, 2, 4, ..., n.

    A line ends where its eigenvalue falls below the error of the kernel, which is the top of a shade.

    Args:
        seen: ``spectrum_row`` by step, at least one.
        title: Of the figure.
        style: Of what is drawn.

    Returns:
        A figure with one panel.

    Raises:
        ValueError: There is no row.
    """
    if not len(seen):
        raise ValueError("seen: empty; need at least one spectrum_row")
    figure = new_figure(style=style)
    margins(figure, right=0.62)
    axes = figure.add_subplot()
    style_axes(axes, style)
    rows, steps = seen.rows.numpy(), seen.steps
    count, floors, below = int(rows[-1, 0]), rows[:, 1], rows[:, 2]
    ranks = geometric_ranks(count)
    values = np.where((rows[:, 3:] > floors[:, None]) & np.isfinite(rows[:, 3:]), rows[:, 3:], np.nan)
    set_title(axes, title, style)
    known = values[np.isfinite(values)]
    if not len(known):
        say(axes, NOTHING_CLEAR.format(below=int(below[-1]), count=count), style)
        return figure
    for number, rank in enumerate(ranks):
        color = SEQUENCE(number / max(len(ranks) - 1, 1))
        axes.plot(steps, values[:, number], color=color, linewidth=1.2, marker="o", markersize=2.2, label=str(rank))
    floors = np.where(np.isfinite(floors) & (floors > 0), floors, np.nan)
    if below.any() and np.isfinite(floors).any():
        low = min(np.nanmin(floors), known.min())
        decades = max(math.log10(known.max() / low), 1.0)
        bottom = low / 10 ** (0.2 * decades)
        axes.set_ylim(bottom, known.max() * 10 ** (SPARE * decades))
        fit_steps(axes, steps, spread=True)
        edges = [axes.get_xlim()[0], *steps, axes.get_xlim()[1]]  # a shade of one measurement has a width, too
        axes.fill_between(edges, bottom, [floors[0], *floors, floors[-1]], color=style.ink, alpha=SHADE, linewidth=0)
        axes.text(
            0.02,
            0.02,
            f"below the error: {int(below[-1])} of {count} at step {steps[-1]}",
            transform=axes.transAxes,
            va="bottom",
            fontsize=style.legend,
            color=style.ink,
        )
    fit_steps(axes, steps, spread=True)
    finish(axes, style, log=True, y="eigenvalue")
    legend(axes, style, beside=True, title="rank")
    return figure
