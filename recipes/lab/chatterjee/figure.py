"""The figure of `lightning-conv lab chatterjee`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.chatterjee.cases import Case
from lightning_conv.recipes.lab.chatterjee.wide import WideStarts
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.chatterjee import DescentCertificate

COLOURS = ("tab:blue", "tab:cyan", "tab:orange", "tab:red")


def draw(cases: Sequence[Case], certificate: DescentCertificate, wide: WideStarts) -> Figure:
    """Draw losses and their bound, scores by radius, ratios and lengths along the path, and random weights by width."""
    figure, panels = sheet(11, 12, 3, 2)
    _losses(panels[0, 0], cases, certificate)
    _scores(panels[0, 1], cases)
    _ratios(panels[1, 0], cases, certificate)
    _lengths(panels[1, 1], cases[0], certificate)
    _widths(panels[2, 0], wide)
    _wide_losses(panels[2, 1], wide)
    return figure


def _losses(axes: Axes, cases: Sequence[Case], certificate: DescentCertificate) -> None:
    for case, colour in zip(cases, COLOURS, strict=True):
        losses = case.path.losses.numpy()
        axes.plot(np.arange(len(losses)) + 1, losses, color=colour, label=case.name)
    first = cases[0].path
    steps = np.arange(first.taken + 1)
    bound = float(first.losses[0]) * np.exp(steps * np.log1p(-certificate.rate))
    axes.plot(steps + 1, bound, color=COLOURS[0], linestyle="--", label="proven: (1 - delta)^k f_0")
    axes.set_ylim(float(first.losses[-1]) / 10, 10)
    dress(axes, "loss", "step + 1", "f(x_k)", log="xy", legend="lower left")


def _scores(axes: Axes, cases: Sequence[Case]) -> None:
    for case, colour in zip(cases, COLOURS, strict=True):
        if case is cases[1]:
            continue  # the same start
        value = float(case.path.losses[0])
        radii = np.asarray(case.radii)
        found = radii**2 * np.asarray(case.infima) / (4 * value)
        label = f"at most (search): {case.name.split(', cert')[0]}"
        axes.plot(radii, np.where(found > 1e-8, found, np.nan), color=colour, label=label)
        if case.certificate is not None:
            axes.fill_between(radii, np.asarray(case.scores), found, color=colour, alpha=0.15)
            axes.plot(radii, case.scores, color=colour, linestyle="--", label="at least (proven)")
    axes.axhline(1, color="black", linewidth=1)
    axes.text(0.02, 1.4, "the criterion asks for more than this", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_ylim(1e-7, 1e7)
    dress(axes, "score r^2 alpha(x_0, r) / (4 f(x_0))", "radius r of the ball", log="xy", legend="upper left")


def _ratios(axes: Axes, cases: Sequence[Case], certificate: DescentCertificate) -> None:
    for case, colour in zip(cases, COLOURS, strict=True):
        ratios = case.path.ratios.numpy()
        axes.plot(np.arange(len(ratios)) + 1, ratios, color=colour, label=case.name)
    label = f"proven alpha in B(x_0, {certificate.radius:.3g})"
    axes.axhline(certificate.alpha.lower, color=COLOURS[0], linestyle="--", label=label)
    dress(axes, "ratio |grad f|^2 / f along the path", "step + 1", log="xy")
    axes.set_ylim(top=1e6)
    axes.legend(fontsize=7, loc="upper left", ncols=2)


def _lengths(axes: Axes, case: Case, certificate: DescentCertificate) -> None:
    steps = np.arange(1, case.path.taken + 2)
    axes.plot(steps, case.path.distances.numpy(), label="distance |x_k - x_0|", color="tab:green")
    axes.plot(steps, case.path.lengths.numpy(), label="path length", color="tab:blue")
    axes.axhline(certificate.length, color="tab:blue", linestyle="--", label="proven bound of the length")
    axes.axhline(certificate.radius, color="black", linewidth=1, label="r")
    dress(axes, "certified run: how far it goes", "step + 1", log="xy")


def _widths(axes: Axes, wide: WideStarts) -> None:
    descent = "descent, eps = 1/2" if wide.widest.epsilon == 0.5 else "descent"
    axes.plot(wide.widths, [each.flow.measured for each in wide.certificates], "o-", label="gradient flow")
    axes.plot(wide.widths, [each.score for each in wide.certificates], "s--", label=descent)
    axes.axhline(1, color="black", linewidth=1)
    dress(axes, "random weights: proven score, at the best radius", "units", log="xy")


def _wide_losses(axes: Axes, wide: WideStarts) -> None:
    title = f"random weights, {wide.widths[-1]} units"
    if wide.path is None:
        dress(axes, f"{title}: not certified, no descent", "step + 1", "f(x_k)", log="xy")
        return
    losses, steps = wide.path.losses.numpy(), np.arange(wide.path.taken + 1)
    bound = losses[0] * np.exp(steps * np.log1p(-wide.widest.rate))
    axes.plot(steps + 1, losses, label="f(x_k), certified step")
    axes.plot(steps + 1, bound, "--", label="proven: (1 - delta)^k f_0")
    dress(axes, title, "step + 1", "f(x_k)", log="xy")
