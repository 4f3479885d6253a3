"""The figure of `lightning-conv lab du_two_layer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.du.two_layer_run import Track
from lightning_conv.recipes.lab.panel import dress, sheet


def draw(
    gaps: Mapping[int, Sequence[float]],
    slope: float,
    tracks: Sequence[Track],
    lambda_0: float,
    eta: float,
    predicted: Tensor,
) -> Figure:
    """Draw the distance to the limit, the error and its bound, lambda_min along training, and the movement by width."""
    figure, panels = sheet(11, 8, 2, 2)
    _limit(panels[0, 0], gaps, slope, lambda_0)
    _error(panels[0, 1], tracks[-1], lambda_0, eta, predicted)
    _smallest(panels[1, 0], tracks, lambda_0)
    _movement(panels[1, 1], tracks)
    return figure


def _limit(axes: Axes, gaps: Mapping[int, Sequence[float]], slope: float, lambda_0: float) -> None:
    widths = np.array(list(gaps), dtype=float)
    for m, values in gaps.items():
        axes.plot([m] * len(values), values, "o", color="tab:blue", markersize=3.5, alpha=0.5)
    logs = np.array([np.mean(np.log(values)) for values in gaps.values()])
    line = np.exp(logs.mean() + slope * (np.log(widths) - np.log(widths).mean()))
    axes.plot(widths, line, color="tab:blue", label=f"fit: m^{slope:.3f}")
    axes.axhline(lambda_0 / 4, color="black", linestyle=":", label="lambda_0 / 4 (Lemma 3.1)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    dress(axes, "the kernel at the start", "width m", "|H(0) - H_inf|_2")


def _error(axes: Axes, track: Track, lambda_0: float, eta: float, predicted: Tensor) -> None:
    k = np.arange(len(track.residuals))
    first = track.residuals[0]
    axes.plot(k, first * np.exp(k / 2 * math.log1p(-eta * lambda_0 / 2)), "k:", label="bound, Theorem 4.1")
    axes.plot(k, track.residuals, color="tab:blue", linewidth=2, label="measured")
    axes.plot(k, predicted.numpy(), color="tab:orange", linestyle="--", label="linear model of H_inf")
    dress(axes, f"the error, m = {track.width:,}", "step k", "|u(k) - y|", log="y")


def _smallest(axes: Axes, tracks: Sequence[Track], lambda_0: float) -> None:
    for track, colour in zip(tracks, colormaps["viridis"](np.linspace(0.9, 0.1, len(tracks))), strict=True):
        axes.plot(track.at, np.array(track.lambda_min) / lambda_0, color=colour, label=f"m = {track.width:,}")
    axes.axhline(0.5, color="black", linestyle=":", label="1/2 (Lemma 3.2)")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylim(-0.3, None)  # room for the legend
    axes.set_yticks(np.arange(0, 1.01, 0.25))
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center")
    dress(axes, "lambda_min along training", "step k", "lambda_min(H(k)) / lambda_0")


def _movement(axes: Axes, tracks: Sequence[Track]) -> None:
    widths = [track.width for track in tracks]
    movement, patterns = [track.movement for track in tracks], [track.patterns or np.nan for track in tracks]
    (line,) = axes.plot(widths, movement, "o-", color="tab:blue", label="max_r |w_r - w_r(0)|")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    dress(axes, "what training moves", "width m", "max_r |w_r - w_r(0)|")
    other = axes.twinx()
    (second,) = other.plot(widths, patterns, "s--", color="tab:orange", label="patterns changed (right)")
    other.set_yscale("log")
    other.set_ylabel("share of activation patterns that changed")
    axes.legend(handles=[line, second], frameon=False, fontsize=9)
