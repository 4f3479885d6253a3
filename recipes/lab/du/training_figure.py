"""The figure of `lightning-conv lab du_train`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.du.training_run import DeepRun
from lightning_conv.recipes.lab.panel import dress, sheet


def draw(runs: Sequence[DeepRun]) -> Figure:
    """Draw one row per network: error and bound, lambda_min and drift, movement, linearisation error."""
    names = list(dict.fromkeys(run.name for run in runs))
    figure, panels = sheet(14, 3.6 * len(names), len(names), 4, squeeze=False)
    for row, name in zip(panels, names, strict=True):
        mine = [run for run in runs if run.name == name]
        widths = sorted({run.width for run in mine})
        colours = {m: colormaps["viridis"](0.85 * k / max(len(widths) - 1, 1)) for k, m in enumerate(widths)}
        for run in mine:
            _one(row, run, colours[run.width])
        widest = mine[-1]
        steps = np.arange(len(widest.losses))
        bound = np.log1p(-widest.eta * widest.lambda_0.value / 2) * steps / 2
        row[0].plot(steps + 1, np.exp(bound), ":", color="black", label=f"theorem, m = {widest.width}")
        row[1].axhline(0.5, color="black", linestyle=":", linewidth=1, label="1/2, for lambda_min")
        row[1].axhline(0.25, color="black", linestyle="-.", linewidth=0.8, label="1/4, for the drift")
        step, movement = "step k + 1", "max_h |W - W(0)|_F / sqrt(m)"
        dress(row[0], f"{name}: the error", step, "|r(k)| / |r(0)|", log="xy", legend="lower left")
        dress(row[1], "lambda_min (solid) and drift (dashed)", step, "over lambda_0", log="x", legend="upper left")
        row[1].set_yscale("symlog", linthresh=1.0)
        row[1].set_ylim(0, 6 * row[1].get_ylim()[1])  # room for the legend
        dress(row[2], "averaged movement of a layer", step, movement, log="xy")
        dress(row[3], "what the linear model leaves out", step, "|I_2| / (eta |G r|)", log="xy")
    return figure


def _one(row: Sequence[Axes], run: DeepRun, colour: tuple[float, float, float, float]) -> None:
    losses = np.array(run.losses)
    at = np.array([probe.step for probe in run.probes]) + 1
    label = f"m = {run.width}" if run.seed == 0 else None
    row[0].plot(np.arange(len(losses)) + 1, np.sqrt(losses / losses[0]), color=colour, label=label)
    row[1].plot(at, [probe.lambda_min.measured for probe in run.probes], "o-", color=colour, markersize=3)
    row[1].plot(at, [probe.drift.measured for probe in run.probes], "s--", color=colour, markersize=3)
    row[2].plot(at[1:], [probe.movement for probe in run.probes[1:]], "o-", color=colour, markersize=3)
    row[3].plot(at, [probe.remainder for probe in run.probes], "o-", color=colour, markersize=3)
