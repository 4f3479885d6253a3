"""``edge_figure``: full-batch training drives itself to the edge of stability: SGD, momentum and Adam in one figure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from lightning_conv.health.step.optimizer_rules import UnknownStepError
from lightning_conv.recipes.lab.health.networks import digits, mlp, one_hot
from lightning_conv.recipes.lab.health.plain_step import PlainStep, operator_of
from lightning_conv.recipes.lab.report import Check

SAMPLES, EVERY = 64, 20
LONG = 1000
"""Steps from which on a run has to be at the edge."""

WITHIN = (0.8, 1.2)
"""Where the median of the last third of the ratios has to lie."""

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD, rate 0.8": (SGD, {"lr": 0.8}),
    "momentum 0.9, rate 0.6": (SGD, {"lr": 0.6, "momentum": 0.9}),
    "Adam, rate 0.003": (Adam, {"lr": 3e-3}),
}


@dataclass(frozen=True)
class EdgeRun:
    """The ratios of a run.

    Attributes:
        name: Of its optimizer.
        steps: Of the measurements.
        ratios: The stability ratios.
        losses: The losses.
    """

    name: str
    steps: tuple[int, ...]
    ratios: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def settled(self) -> float:
        """Median of the last third of the ratios."""
        return median(self.ratios[-max(1, len(self.ratios) // 3) :])


def edge_run(name: str, *, seed: int, steps: int) -> EdgeRun:
    """Train a perceptron on all samples at once with the squared loss, and measure the ratio.

    Args:
        name: One of ``OPTIMIZERS``.
        seed: Of samples and weights.
        steps: Optimizer steps.
    """
    torch.manual_seed(seed)
    x, labels = digits(SAMPLES, seed)
    y, net = one_hot(labels), mlp(64, 64, activation=nn.Tanh)
    kind, options = OPTIMIZERS[name]
    optimizer, operator = kind(net.parameters(), **options), operator_of(net, x)
    vector, rows = None, []
    for step in range(steps + 1):
        loss = F.mse_loss(net(x), y)
        if step % EVERY == 0:
            try:
                now = PlainStep(net, operator, x, lambda u: F.mse_loss(u, y.to(u)), optimizer)
            except UnknownStepError:
                now = None
            if now is not None:
                reading, vector = now.ratio(step, vector)
                assert reading is not None
                rows.append((step, reading.lower, loss.item()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    taken, ratios, losses = zip(*rows, strict=True)
    return EdgeRun(name, taken, ratios, losses)


def edge_figure(runs: list[EdgeRun]) -> Figure:
    """Draw the ratios of the runs above their losses.

    Args:
        runs: The runs.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(2, len(runs), sharex="col", squeeze=False)
    for place, run in enumerate(runs):
        above, below = panels[0][place], panels[1][place]
        above.plot(run.steps, run.ratios, lw=1)
        above.axhline(1.0, color="black", lw=0.8, ls="--")
        above.set(title=run.name, ylim=(0, max(1.5, 1.05 * max(run.ratios))))
        below.semilogy(run.steps, run.losses, lw=1)
        below.set(xlabel="step")
    panels[0][0].set(ylabel="stability ratio")
    panels[1][0].set(ylabel="loss")
    return figure


def check_edge(run: EdgeRun) -> Check:
    """Return the check that a run rises to the edge and stays there.

    Args:
        run: The run.
    """
    low, high = WITHIN
    seen = f"from {run.ratios[0]:.2f} to {run.settled:.2f}"
    claim = f"edge of stability, {run.name}: the median of the last third of the ratios is {low:g} to {high:g}"
    holds = run.ratios[0] < low <= run.settled <= high
    return Check(claim, "Cohen et al. 2021, 2022", holds, seen, must=run.steps[-1] >= LONG)
