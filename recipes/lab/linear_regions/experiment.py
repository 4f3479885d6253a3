"""Linear regions of ReLU networks of one variable: counted exactly, before and after training, and the most that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.linear_regions import LinearRegions, linear_regions, most_regions, typical_regions

SOURCE = "Montufar et al. 2014; Serra et al. 2018"


@dataclass(frozen=True)
class Run:
    """One network, trained."""

    widths: tuple[int, ...]
    seed: int
    start: LinearRegions
    end: LinearRegions
    loss: float
    off: float  # largest difference between the network and the line through its kinks, over the size of the values
    curve: Tensor | None = None  # (points, 2), of the first seed


def run(
    width: int = 16,
    depths: tuple[int, ...] = (1, 2, 3),
    seeds: int = 5,
    points: int = 100,
    steps: int = 2000,
    lr: float = 5e-3,
) -> Report:
    """Fit sin(6 pi x) on [0, 1] with ReLU networks of one input, by Adam on all points, and count their pieces exactly.

    Args:
        width: of every hidden layer.
        depths: numbers of hidden layers.
        seeds: initialisations (torch's default: uniform weights and biases).
        points: of the target.
        steps: of Adam.
        lr: its rate.

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
    with progress_bar("training", 60.0, None) as report:
        for k, (depth, seed) in enumerate((depth, seed) for depth in depths for seed in range(seeds)):
            runs.append(_train((width,) * depth, seed, x, y, steps, lr))
            report((k + 1) / len(depths) / seeds)
    folded = {depth: linear_regions(sawtooth(depth)) for depth in (1, 2, 3, 4, 5, 6)}
    setting = (
        f"Networks of one input with {width} units a hidden layer, fitted to sin(6 pi x) at {points} points of "
        f"[0, 1] by Adam ({steps} steps, rate {lr:g}); {seeds} initialisations a depth. Every breakpoint on the "
        "whole line is found in rational arithmetic: the weights are rational numbers, so are the breakpoints, "
        "and every count is exact. Beside them the folding network (width 2, x -> |2x - 1| repeated), whose "
        "pieces double with each layer."
    )
    return Report(
        name="linear-regions",
        title="Linear regions of a network of one variable: far fewer than possible",
        setting=setting,
        checks=_checks(runs, folded, width),
        tables={
            "By depth, means over the initialisations": [_row(runs, depth) for depth in depths],
            "The folding network": [_folded_row(depth, found) for depth, found in folded.items()],
        },
        figure=_draw(runs, folded, x, y),
        data={"runs": [_plain(r) for r in runs]},
    )


def network(widths: Sequence[int]) -> nn.Sequential:
    """1 -> widths -> 1 with ReLUs, float64."""
    layers: list[nn.Module] = []
    sizes = [1, *widths]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1, dtype=torch.float64))


@torch.no_grad()
def sawtooth(depth: int) -> nn.Sequential:
    """x -> |2x - 1| applied ``depth`` times, with width 2: |2x - 1| = relu(2x - 1) + relu(1 - 2x); 2^depth pieces.

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
    """How far the network leaves the straight line between neighbouring kinks, at three points of each piece, over its largest value there.

    A missing kink would show. Pieces of a width below 1e-9 are skipped: rounding of the points hides them.
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


def _checks(runs: Sequence[Run], folded: dict[int, LinearRegions], width: int) -> list[Check]:
    off = max(r.off for r in runs)
    most = max(max(r.start.pieces, r.end.pieces) / most_regions(r.widths) for r in runs)
    ratio = [r.start.activation_regions / typical_regions(r.widths) for r in runs]
    grown = max(r.end.pieces / typical_regions(r.widths) for r in runs)
    kogan = "Hanin, Rolnick 2019; Kogan, Jananthan, Kepner 2025 (infinite width)"
    return [
        Check("between two neighbouring kinks the network is straight", "the count itself", off < 1e-9, f"off by {off:.1e} of its size"),
        Check("pieces <= product of (width + 1)", SOURCE, most <= 1, f"at most {most:.3g} of the bound is used"),
        Check("the folding network has 2^depth pieces", "Telgarsky 2016", all(f.pieces == 2**d for d, f in folded.items()),
              ", ".join(f"{d}: {f.pieces}" for d, f in folded.items())),
        Check("at the start about one breakpoint a unit at any depth (to 25 %)", kogan, all(0.75 <= value <= 1.25 for value in ratio),
              f"regions over (sum of widths + 1): {min(ratio):.2f} to {max(ratio):.2f}", must=False),
        Check("trained networks have fewer than 3 (sum of widths + 1) pieces", "observed; Hanin, Rolnick 2019", grown < 3,
              f"at most {grown:.2f} times, at width {width}", must=False),
    ]  # fmt: skip


def _row(runs: Sequence[Run], depth: int) -> dict[str, object]:
    mine = [r for r in runs if len(r.widths) == depth]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "hidden layers": depth,
        "units": sum(mine[0].widths),
        "pieces, start": mean([r.start.pieces for r in mine]),
        "pieces, end": mean([r.end.pieces for r in mine]),
        "of them in [0, 1]": mean([r.end.within(0, 1) for r in mine]),
        "activation regions, end": mean([r.end.activation_regions for r in mine]),
        "sum of widths + 1": typical_regions(mine[0].widths),
        "most possible": most_regions(mine[0].widths),
        "mean squared error": mean([r.loss for r in mine]),
    }


def _folded_row(depth: int, found: LinearRegions) -> dict[str, object]:
    return {
        "hidden layers": depth,
        "pieces": found.pieces,
        "2^depth": 2**depth,
        "most possible": most_regions(found.widths),
    }


def _plain(r: Run) -> dict[str, object]:
    counts = {"start": r.start.pieces, "end": r.end.pieces, "kinks": r.end.kinks}
    return {"widths": r.widths, "seed": r.seed, **counts, "loss": r.loss}


def _draw(runs: Sequence[Run], folded: dict[int, LinearRegions], x: Tensor, y: Tensor) -> Figure:
    figure = Figure(figsize=(13.5, 4), layout="constrained")
    fit, by_depth = figure.subplots(1, 2, width_ratios=(1.6, 1))
    shown = [r for r in runs if r.curve is not None]
    fit.plot(x[:, 0], y[:, 0], color="0.7", linewidth=4, label="target")
    for k, r in enumerate(shown):
        assert r.curve is not None
        fit.plot(
            r.curve[:, 0],
            r.curve[:, 1],
            color=f"C{k}",
            linewidth=1.1,
            label=f"{len(r.widths)} hidden layer" + "s" * (len(r.widths) > 1),
        )
        inside = [kink for kink in r.end.kinks if -0.1 < kink < 1.1]
        fit.plot(inside, [-1.35 - 0.14 * k] * len(inside), "|", color=f"C{k}", markersize=8)
    fit.set(
        xlabel="x (ticks below: kinks of each network)", ylabel="f(x)", title="fits and their kinks", ylim=(-1.8, 1.9)
    )
    depths = sorted({len(r.widths) for r in runs})
    for r in runs:
        shift = 0.08 * (r.seed % 5 - 2)
        by_depth.plot(len(r.widths) + shift, r.start.pieces, "o", color="C0", markersize=4, mfc="none")
        by_depth.plot(len(r.widths) + shift, r.end.pieces, "o", color="C1", markersize=4)
    width = runs[0].widths[0]
    by_depth.plot(depths, [most_regions([width] * d) for d in depths], "k-", label="most possible")
    by_depth.plot(depths, [typical_regions([width] * d) for d in depths], "k:", label="sum of widths + 1")
    by_depth.plot(
        list(folded), [f.pieces for f in folded.values()], "x--", color="C2", label="folding network, width 2"
    )
    by_depth.plot([], [], "o", color="C0", mfc="none", label="start")
    by_depth.plot([], [], "o", color="C1", label="trained")
    by_depth.set(yscale="log", xlabel="hidden layers", ylabel="linear pieces", title="pieces by depth")
    for axes in (fit, by_depth):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncols=2 if axes is fit else 1)
        axes.title.set_fontsize(10)
    return figure
