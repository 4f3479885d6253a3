"""``plot_error_modes``: the error of a run in the eigenbasis of its first kernel, by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.reporting.figures.style import (
    CARD,
    SEQUENCE,
    Style,
    finish,
    fit_steps,
    legend,
    margins,
    new_figure,
    say,
    set_title,
    style_axes,
)
from lightning_conv.reporting.log_steps import LogSteps

LEAST_DRAWN = 1e-16
"""Share of the first error below which a component is rounding of float64."""


def mode_groups(count: int, below: int) -> list[tuple[int, int]]:
    """Return the groups of eigenvectors whose components are added up, as first and last rank: 1, 2-3, 4-7, ..., and those below the error.

    Single directions of the tail are of no use, as eigenvectors of nearly equal eigenvalues are arbitrary, and so are all of those whose
    eigenvalue is below its error. The space that a group spans is not.

    Args:
        count: Number N of eigenvectors.
        below: How many of them, the last ones, have an eigenvalue below its error.

    Example:
        >>> mode_groups(12, 4)
        [(1, 1), (2, 3), (4, 7), (8, 8), (9, 12)]
    """
    clear = count - below
    groups = [(2**power, min(2 ** (power + 1) - 1, clear)) for power in range(clear.bit_length())]
    return [*groups, (clear + 1, count)] if below else groups


def mode_components(vectors: Tensor, residual: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    r"""Return the length of the error's projection onto the space of each group, :math:`(\sum_{i \in g} |v_i^T R|^2)^{1/2}`.

    Args:
        vectors: (N, N), orthonormal columns v_i, by ascending eigenvalue.
        residual: R, (N,), or (N, C) where C outputs share one kernel.
        groups: See ``mode_groups``.

    Returns:
        (number of groups,), float64; their squares add up to :math:`|R|_F^2`.
    """
    rows = residual.detach().to(vectors).reshape(len(vectors), -1)
    energies = (vectors.T @ rows).square().sum(1).flip(0)
    return torch.stack([energies[first - 1 : last].sum() for first, last in groups]).sqrt().double().cpu()


def plot_error_modes(
    seen: LogSteps,
    groups: Sequence[tuple[int, int]],
    below: int = 0,
    title: str = "Error by kernel eigenvector",
    style: Style = CARD,
) -> Figure:
    """Plot the components of the error in the first kernel's eigenbasis against the step, over the length of the first error.

    With a constant kernel, plain descent shrinks each component at a rate of its own, the first ones fastest. Those below the error of the
    kernel are one line, drawn dotted.

    Args:
        seen: ``mode_components`` by step, at least one.
        groups: Their groups.
        below: Number of eigenvectors in the last group whose eigenvalue is below its error; 0: there is no such group.
        title: Of the figure.
        style: Of what is drawn.

    Returns:
        A figure with one panel; its dashed line is the length of the whole error.

    Raises:
        ValueError: There is no row, or the number of groups is another one.
    """
    if not len(seen) or seen.rows.shape[1] != len(groups):
        raise ValueError(f"seen: shape {tuple(seen.rows.shape)}; need a row of {len(groups)} components for each step")
    figure = new_figure(style=style)
    margins(figure, right=0.8)
    axes = figure.add_subplot()
    style_axes(axes, style)
    set_title(axes, title, style)
    rows = seen.rows.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.sqrt(np.square(rows).sum(1))
    if not (np.isfinite(whole[0]) and whole[0] > 0):
        say(axes, "The first error is zero or not finite, so that no later one can be compared with it.", style)
        return figure
    steps = seen.steps
    shares = [_drawable(rows[:, number] / whole[0]) for number in range(len(groups))]
    clear = len(groups) - bool(below)
    for number, ((first, last), share) in enumerate(zip(groups, shares, strict=True)):
        tail = bool(below) and number == clear
        color = style.ink if tail else SEQUENCE(number / max(clear - 1, 1))
        name = f"{first}" if first == last else f"{first}\u2013{last}"
        axes.plot(
            steps,
            share,
            color=color,
            linewidth=1.2,
            linestyle=":" if tail else "-",
            marker="o",
            markersize=2.2,
            label=f"{name}*" if tail else name,
        )
    axes.plot(steps, _drawable(whole / whole[0]), color=style.ink, linestyle="--", linewidth=1.0, label="all")
    fit_steps(axes, steps, spread=True)
    finish(
        axes,
        style,
        log=True,
        x="step" + ("   (*: eigenvalue below its error)" if below else ""),
        y="error / first error",
    )
    legend(axes, style, beside=True, title="eigenvector")
    return figure


def _drawable(values: np.ndarray) -> np.ndarray:
    """Return values with a gap where a logarithmic axis has no place for them."""
    return np.where(np.isfinite(values) & (values > LEAST_DRAWN), values, np.nan)
