"""The figure of `lightning-conv lab allen_zhu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.allen_zhu.findings import ALONG, Fit, Run
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.tools.power_law import PowerLaw


def draw(
    runs: Sequence[Run],
    fits: Mapping[int, Fit],
    worst: tuple[list[float], list[float], PowerLaw],
    laws: Mapping[str, tuple[PowerLaw, str]],
) -> Figure:
    """Draw loss, gradient ratio, movement by width, switched units by omega, drift, and semi-smoothness."""
    widths = sorted({r.width for r in runs})
    colours = {m: colormaps["viridis"](0.9 * k / max(len(widths) - 1, 1)) for k, m in enumerate(widths)}
    figure, axes = sheet(13.5, 7.6, 2, 3)
    for r in runs:
        steps = [max(p.step, 0.7) for p in r.probes]
        style = {"color": colours[r.width], "linewidth": 1.1}
        label = f"m = {r.width}" if r.seed == 0 else None
        axes[0, 0].plot(steps, [p.ratios.loss / r.probes[0].ratios.loss for p in r.probes], label=label, **style)
        axes[0, 1].plot(steps, [p.ratios.over_sum / r.width for p in r.probes], **style)
        moved = [p for p in r.probes if p.omega > 0 and p.changed > 0]
        axes[1, 0].plot([p.omega for p in moved], [p.changed for p in moved], **style)
        axes[1, 1].plot([p.omega for p in r.probes[1:]], [p.drift for p in r.probes[1:]], **style)
    step = "step (the first point is step 0)"
    dress(axes[0, 0], "training loss", step, "F / F(0)", log="xy")
    dress(axes[0, 1], "gradient ratio: no critical point on the way", step, r"$|\nabla F|^2 / (m F)$", log="xy")
    _by_width(axes[0, 2], runs, laws)
    omega, share, law = worst
    axes[1, 0].scatter(omega, share, s=7, color="k", linewidths=0)
    ends = np.array([min(omega), max(omega)])
    fitted = law.factor * ends**law.exponent
    axes[1, 0].plot(ends, fitted, "k--", linewidth=1, label=f"worst step: exponent {law.exponent:.2f}")
    along = laws[ALONG][0]
    axes[1, 0].plot([], [], " ", label=f"training: exponent {along.exponent:.2f}")
    omega_name = r"$\omega = \max_l |W_l - W_l(0)|_2$"
    dress(axes[1, 0], "switched units over training", omega_name, "share of switched units", log="xy")
    dress(axes[1, 1], "forward drift over training", r"$\omega$", r"$\max |h_{i,l} - h_{i,l}(0)|$", log="xy")
    for width, fit in fits.items():
        held = [*fit.same_run, *fit.other_runs]
        points = [(fit.bound.bound(s), s.value) for s in held if s.resolved and s.value > 0]
        axes[1, 2].scatter([b for b, _ in points], [rho for _, rho in points], s=9, color=colours[width], linewidths=0)
    bound, residual = r"fitted bound $a \sqrt{F} |V| + b |V|^2$", r"$\rho$ on held-out steps"
    dress(axes[1, 2], "semi-smoothness", bound, residual, log="xy")
    ends = np.array(axes[1, 2].get_xlim())
    axes[1, 2].plot(ends, ends, "k-", linewidth=1, label="the bound")
    axes[1, 2].legend(frameon=False, fontsize=8)
    return figure


def _by_width(axes: Axes, runs: Sequence[Run], laws: Mapping[str, tuple[PowerLaw, str]]) -> None:
    measured = {
        r"$|W - W(0)|_2 / |W(0)|_2$": [r.last.relative_spectral for r in runs],
        r"$|W - W(0)|_F / |W(0)|_F$": [r.last.relative_frobenius for r in runs],
        "switched units": [r.last.changed for r in runs],
    }
    grid = np.array(sorted({r.width for r in runs}))
    for k, ((name, values), (law, _)) in enumerate(zip(measured.items(), laws.values(), strict=False)):
        axes.scatter([r.width for r in runs], values, s=12, color=f"C{k}", linewidths=0)
        label = rf"{name}: $m^{{{law.exponent:.2f}}}$"
        axes.plot(grid, law.factor * grid**law.exponent, color=f"C{k}", linewidth=1.1, label=label)
    dress(axes, "movement falls with the width", "width m", "after training", log="xy")
    axes.set_xticks(grid, [str(m) for m in grid])
    axes.minorticks_off()
