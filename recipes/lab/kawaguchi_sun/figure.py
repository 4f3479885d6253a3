"""The figure of `lightning-conv lab kawaguchi_sun`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.kawaguchi_sun.findings import HeadDescent, curve
from lightning_conv.recipes.lab.kawaguchi_sun.phase_one import PhaseOne
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts


def draw(runs: Sequence[HeadDescent], facts: dict[str, ExpressivityFacts], started: dict[str, PhaseOne]) -> Figure:
    """Draw the ranks in phase 1, and the losses of phase 2 with their bounds and the singular values behind them."""
    figure, ((ranks, smallest), (left, right)) = sheet(11, 8.2, 2, 2)
    _ranks(ranks, started)
    _smallest(smallest, started["wide"])
    for each, colour in zip(runs, ("tab:blue", "tab:green", "tab:red"), strict=True):
        shown = curve(each)
        steps = np.asarray(shown["step"]) + 1
        left.plot(steps, shown["loss"], color=colour, label=each.name)
        label = "O(1/t) bound" if each is runs[0] else None
        left.plot(steps, shown["bound"], color=colour, linestyle="--", label=label)
        if shown["linear bound"]:
            left.plot(steps, shown["linear bound"], color=colour, linestyle=":", label="linear bound")
        if each.floor:
            left.axhline(each.floor, color=colour, linewidth=0.8, linestyle="-.", label="floor: alignment residual")
    dress(left, "L(w_t) - inf L and its bounds", "step of phase 2 + 1", log="xy", legend="lower left")
    for name, colour in (("wide", "tab:blue"), ("narrow", "tab:red")):
        values = facts[name].singular_values.numpy()
        label = f"{name}: {len(values)} of n = {facts[name].certificate.n}"
        right.semilogy(np.arange(1, len(values) + 1), values, color=colour, label=label)
    right.axvline(facts["wide"].certificate.n, color="black", linewidth=0.8)
    dress(right, "singular values of [h, 1]", "index (the line: n)", legend="lower left")
    return figure


def _ranks(axes: Axes, started: dict[str, PhaseOne]) -> None:
    for (name, each), colour in zip(started.items(), ("tab:blue", "tab:red"), strict=True):
        shown, n = each.curve(), each.after.facts.certificate.n
        steps = np.asarray(shown["step"]) + 1
        for kind, style in (("rank", "-"), ("effective rank", "--"), ("stable rank", ":")):
            values = np.asarray(shown[kind]) / n
            label = f"{name}: {'proven rank' if kind == 'rank' else kind}"
            axes.plot(steps[:-1], values[:-1], style, color=colour, label=label)
            axes.plot(steps[-1:], values[-1:], "o", color=colour, markersize=4)
    dress(axes, "ranks of [h, 1] over n", "step of phase 1 + 1 (dots: after the noise)", log="xy")
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.0, 0.18), ncols=2)


def _smallest(axes: Axes, wide: PhaseOne) -> None:
    shown = wide.curve()
    steps = np.asarray(shown["step"]) + 1
    for kind, name, colour in (
        ("sigma_min", "n-th singular value", "tab:blue"),
        ("loss", "cross-entropy", "tab:orange"),
    ):
        values = np.asarray(shown[kind])
        axes.plot(steps[:-1], values[:-1], color=colour, label=f"wide: {name}")
        axes.plot(steps[-1:], values[-1:], "o", color=colour, markersize=4)
    dress(axes, "sigma_n([h, 1]) and the loss in phase 1", "step of phase 1 + 1 (dots: after the noise)", log="xy")
    axes.legend(fontsize=8, loc="center left")
