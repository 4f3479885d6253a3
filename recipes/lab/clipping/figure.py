"""The figure of `lightning-conv lab clipping`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_conv.recipes.lab.clipping.findings import REGIME_COLOURS, Checked
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.clipping import clipped_loss_bound

COLOURS = {"gradient descent": "tab:gray", "clipping": "tab:orange", "delta-GClip": "tab:blue"}


def draw(checked: Checked, relative: Sequence[float], ends: dict[str, list[float]]) -> Figure:
    """Draw the loss and its bounds, the three regimes, and the losses by learning rate."""
    figure, (left, middle, right) = sheet(12, 3.8, 1, 3)
    path, steps = checked.path, range(len(checked.path.losses))
    rate = [clipped_loss_bound(path.losses[0], eta=path.eta, delta=path.delta, mu=checked.mu, steps=t) for t in steps]
    left.plot(steps, path.losses, color=COLOURS["delta-GClip"], label="measured")
    left.plot(steps, checked.bounds(), color="black", linestyle="--", label="bound with the steps taken")
    left.plot(steps, rate, color="black", linestyle=":", label="$(1 - \\eta\\delta\\mu/2)^t f_0$")
    dress(left, "Wide network: the loss and its bounds", "step", "loss", log="y")

    for regime, colour in REGIME_COLOURS.items():
        inside = [t for t, each in enumerate(path.regimes) if each == regime]
        factors = [path.steps[t] / path.eta for t in inside]
        middle.scatter([path.norms[t] for t in inside], factors, s=9, color=colour, label=regime)
    dress(middle, "Three regimes, in the order of the run", "norm of the gradient", "step over learning rate", log="x")
    middle.set_ylim(0, 1.1)
    middle.invert_xaxis()

    top = 4 * max(1.0, *(loss for losses in ends.values() for loss in losses if math.isfinite(loss)))
    for k, (name, losses) in enumerate(ends.items()):
        right.plot(relative, losses, marker="o", markersize=3, color=COLOURS[name], label=name)
        gone = [rate for rate, loss in zip(relative, losses, strict=True) if math.isinf(loss)]
        right.plot(gone, [top * 0.6**k] * len(gone), linestyle="", marker="x", color=COLOURS[name])
    title, rates = "Learning rates (crosses: diverged)", "learning rate / (n / largest eigenvalue)"
    dress(right, title, rates, "loss at the end", log="xy")
    right.axvline(2.0, color="black", linewidth=0.8, linestyle=":")
    return figure
