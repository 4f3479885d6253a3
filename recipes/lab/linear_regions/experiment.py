"""Linear regions of ReLU networks of one variable: counted exactly, before and after training, against the bound."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.recipes.lab.linear_regions.figure import draw
from lightning_conv.recipes.lab.linear_regions.findings import Run, checks_of, folded_row, plain, row
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.linear_regions import LinearRegions, linear_regions

SMALL: dict[str, Any] = {"width": 5, "depths": (1, 2), "seeds": 2, "steps": 30}
"""Settings with which `run` takes seconds."""


def run(
    width: int = 16,
    depths: tuple[int, ...] = (1, 2, 3),
    seeds: int = 5,
    points: int = 100,
    steps: int = 2000,
    lr: float = 5e-3,
) -> Report:
    """Fit sin(6 pi x) on [0, 1] with ReLU networks of one input, by Adam on all points, and count their pieces exactly.

    Cost: about 70 s on 2 cores with the default settings.

    Args:
        width: units per hidden layer.
        depths: numbers of hidden layers.
        seeds: number of initialisations (torch's default: uniform weights and biases).
        points: number of points of the target.
        steps: steps of Adam.
        lr: learning rate of Adam.

    Returns:
        The checks of the counts, and tables by depth and of the folding network.

    Raises:
        ValueError: a setting is not positive.
    """
    if min(width, seeds, points - 1, steps, *depths) < 1:
        raise ValueError(
            f"width, depths, seeds, points, steps: {width}, {depths}, {seeds}, {points}, {steps}; need positive numbers"
        )
    x = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    y = torch.sin(6 * torch.pi * x)
    runs = []
    # 60 s: a rough duration; it only decides whether a bar is shown (``progress.LONG``).
    with progress_bar("training", 60.0, None) as report:
        for k, (depth, seed) in enumerate((depth, seed) for depth in depths for seed in range(seeds)):
            runs.append(_train((width,) * depth, seed, x, y, steps, lr))
            report((k + 1) / len(depths) / seeds)
    folded = {depth: linear_regions(sawtooth(depth)) for depth in (1, 2, 3, 4, 5, 6)}
    setting = (
        f"Networks of one input with {width} units per hidden layer, fitted to sin(6 pi x) at {points} points of [0, 1] by Adam ({steps} "
        f"steps, rate {lr:g}); {seeds} initialisations per depth. Every breakpoint on the whole line is found in rational arithmetic: the "
        "weights are rational numbers, so are the breakpoints, and every count is exact. Beside them the folding network (width 2, x -> "
        "|2x - 1| repeated), whose pieces double with each layer."
    )
    return Report(
        name="linear_regions",
        title="Linear regions of a network of one variable: far fewer than possible",
        setting=setting,
        checks=checks_of(runs, folded, width),
        tables={
            "By depth, means over the initialisations": [row(runs, depth) for depth in depths],
            "The folding network": [folded_row(depth, found) for depth, found in folded.items()],
        },
        figure=draw(runs, folded, x, y),
        data={"runs": [plain(r) for r in runs]},
    )


def network(widths: Sequence[int]) -> nn.Sequential:
    """Return a network 1 -> widths -> 1 with ReLUs, in float64."""
    layers: list[nn.Module] = []
    sizes = [1, *widths]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1, dtype=torch.float64))


@torch.no_grad()
def sawtooth(depth: int) -> nn.Sequential:
    """Return x -> |2x - 1| = relu(2x - 1) + relu(1 - 2x) applied ``depth`` times, with width 2; it has 2^depth pieces.

    Source: Telgarsky 2016 (with a fold in the place of his tent map).
    """
    net = network((2,) * depth)
    for k, layer in enumerate(module for module in net if isinstance(module, nn.Linear)):
        sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        incoming = 1 if k == 0 else 2
        if k < depth:
            layer.weight.copy_(2 * sign.expand(2, incoming))
            layer.bias.copy_(-sign[:, 0])
        else:
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    return net


def _train(widths: tuple[int, ...], seed: int, x: Tensor, y: Tensor, steps: int, lr: float) -> Run:
    """Train one network and count its pieces before and after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network(widths)
    start = linear_regions(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    end = linear_regions(net)
    with torch.no_grad():
        grid = torch.linspace(-0.1, 1.1, 600, dtype=torch.float64)
        curve = torch.stack([grid, net(grid[:, None])[:, 0]], 1) if seed == 0 else None
        return Run(widths, seed, start, end, float((net(x) - y).square().mean()), off_the_line(net, end), curve)


@torch.no_grad()
def off_the_line(net: nn.Sequential, found: LinearRegions) -> float:
    """Return the largest distance of the network from the line between neighbouring kinks, over its largest value there.

    Each piece is tested at three points, so that a missing kink would show. Pieces of a width below 1e-9 are skipped:
    rounding of the points hides them.
    """
    kinks = torch.tensor(found.kinks, dtype=torch.float64)
    if len(kinks) < 2:
        return 0.0
    lower, upper = kinks[:-1], kinks[1:]
    wide = (upper - lower) > 1e-9 * (1 + lower.abs())
    lower, upper = lower[wide], upper[wide]
    ends = net(lower[:, None])[:, 0], net(upper[:, None])[:, 0]
    scale = torch.maximum(ends[0].abs(), ends[1].abs()) + 1
    worst = 0.0
    for share in (0.25, 0.5, 0.75):
        inside = net((lower + share * (upper - lower))[:, None])[:, 0]
        line = ends[0] + share * (ends[1] - ends[0])
        worst = max(worst, float(((inside - line).abs() / scale).max()))
    return worst
