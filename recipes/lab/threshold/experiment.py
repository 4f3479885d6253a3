"""Threshold networks on a few digits: the convex optimum, certified, against straight-through training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.theory.papers.threshold import (
    SOURCE,
    Arrangement,
    ThresholdOptimum,
    arrangement_patterns,
    cell_count,
    shattered_optimum,
    solve_threshold_network,
)

SHATTERED = 8
"""Samples of the shattered case: 2^8 patterns."""


@dataclass(frozen=True)
class StraightThrough:
    """Runs of one width from several seeds, each at the best objective that it visited."""

    width: int
    objectives: list[float]
    sampled: list[float]  # of the convex program on as many random patterns, from the same seeds

    def excess(self, optimum: ThresholdOptimum) -> list[float]:
        """Relative to the certified lower bound of the optimum."""
        return [value / optimum.lower - 1 for value in self.objectives]

    def sampled_excess(self, optimum: ThresholdOptimum) -> float:
        """The median of the convex program on random patterns, likewise."""
        return statistics.median(self.sampled) / optimum.lower - 1


def run(
    n: int = 20,
    decay: tuple[float, ...] = (0.03, 0.1, 0.3),
    widths: tuple[int, ...] = (4, 16, 64),
    runs: int = 20,
    steps: int = 3000,
    rate: float = 0.01,
    source: Source = "digits",
    root: str = "data",
) -> Report:
    """Solve the convex program for two principal components of images and train the same problem by straight-through estimates.

    Args:
        n: images of 3 and 8, half of each.
        decay: values of beta.
        widths: hidden units of the straight-through networks.
        runs: seeds for each width.
        steps: of Adam.
        rate: its learning rate.
        source: of the images.
        root: folder of MNIST.

    Raises:
        ValueError: no run, width or decay.
    """
    if min(runs, steps, len(decay), len(widths)) < 1:
        raise ValueError(f"runs, steps, decay, widths: {runs}, {steps}, {decay}, {widths}; need at least one of each")
    data = two_classes(n, source=source, root=root)
    plane = _principal_components(data.inputs, 2)
    inputs = torch.cat([plane, torch.ones(n, 1, dtype=torch.float64)], 1)
    arrangement = arrangement_patterns(inputs)
    optima = {beta: solve_threshold_network(arrangement.patterns, data.targets, beta) for beta in decay}
    trained = {
        beta: [
            StraightThrough(
                width,
                _straight_through(inputs, data.targets, beta, width, runs, steps, rate),
                _sampled(inputs, data.targets, beta, width, runs),
            )
            for width in widths
        ]
        for beta in decay
    }
    shattered = two_classes(SHATTERED, source=source, root=root)
    shatter = arrangement_patterns(shattered.inputs)
    rows = [
        {
            "beta": beta, "optimum": optima[beta].objective, "duality gap": optima[beta].gap, "units of it": optima[beta].units,
            "width": each.width, "best run above it": f"{min(each.excess(optima[beta])):.1%}",
            "median run above it": f"{statistics.median(each.excess(optima[beta])):.1%}",
            "convex program on as many random patterns, median": f"{each.sampled_excess(optima[beta]):.1%}",
        }
        for beta in decay for each in trained[beta]
    ]  # fmt: skip
    checks = [
        *_arrangement_checks(arrangement, n),
        *_optimum_checks(inputs, data.targets, arrangement, optima, trained),
    ]
    checks += _shattered_checks(shattered.targets, shatter, decay)
    setting = (
        f"{n} images of {source} (3 and 8, targets -1 and 1) in their first two principal components and a column of ones; "
        "1/2 |f(X) - y|^2 + beta/2 "
        "|theta|^2 over two-layer networks with units s_j 1{<v_j, x> >= 0}. Straight-through: Adam "
        f"(rate {rate:g}, {steps} steps, {runs} seeds for each width), the derivative of a sigmoid in place of the step's, directions "
        "of norm 1; "
        "counted is the best objective that a run visited, with amplitudes balanced, which can only lower it. "
        "Beside it the convex program on the patterns of as many random directions, for the output weights alone. "
        f"The shattered case: {SHATTERED} images in all {shattered.inputs.shape[1]} pixels."
    )
    return Report(
        "threshold", "Threshold networks: the convex optimum and straight-through training", setting, checks,
        {"Objectives": rows}, _figure(plane, data.targets, arrangement, optima, trained),
        {"excess": {f"{beta:g}": {each.width: each.excess(optima[beta]) for each in trained[beta]} for beta in decay}},
    )  # fmt: skip


def _principal_components(inputs: Tensor, count: int) -> Tensor:
    """Coordinates of the centred rows, (n, count), scaled to a largest one of 1."""
    centred = inputs - inputs.mean(0)
    scores = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:count].T
    scaled: Tensor = scores / scores.abs().max()
    return scaled


def _straight_through(
    inputs: Tensor, targets: Tensor, beta: float, width: int, runs: int, steps: int, rate: float
) -> list[float]:
    """The smallest balanced objective that each of ``runs`` networks visits; all of them are trained side by side."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = normal(runs, inputs.shape[1], width).requires_grad_()
    amplitudes = torch.ones(runs, width, dtype=torch.float64, requires_grad=True)
    weights = (normal(runs, width) / width**0.5).requires_grad_()
    optimizer = torch.optim.Adam([directions, amplitudes, weights], lr=rate)
    best = torch.full((runs,), torch.inf, dtype=torch.float64)
    for _ in range(steps):
        values = inputs @ (directions / directions.norm(dim=1, keepdim=True))
        soft = torch.sigmoid(4 * values)
        units = (values >= 0).double() - soft.detach() + soft
        outputs = (units * (amplitudes * weights)[:, None]).sum(2)
        misfit = 0.5 * (outputs - targets).square().sum(1)
        loss = misfit + beta / 2 * (amplitudes.square() + weights.square()).sum(1)
        best = torch.minimum(best, (misfit + beta * (amplitudes * weights).abs().sum(1)).detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return [float(value) for value in best]


def _sampled(inputs: Tensor, targets: Tensor, beta: float, width: int, runs: int) -> list[float]:
    """Optima of the convex program on the patterns of ``width`` random directions: the first layer is never trained."""
    found = []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(inputs.shape[1], width, generator=generator, dtype=torch.float64)
        patterns = torch.unique((inputs @ directions >= 0).double(), dim=1)
        found.append(solve_threshold_network(patterns, targets, beta).objective)
    return found


def _arrangement_checks(arrangement: Arrangement, n: int) -> list[Check]:
    expected = cell_count(n, 3)
    return [
        Check(
            "the patterns are 2 sum_{k < r} C(n - 1, k) for samples in general position", "Cover 1965",
            arrangement.count == expected or not arrangement.general_position,
            f"n = {n}, r = 3: {arrangement.count} patterns, formula {expected}, general position: {arrangement.general_position}",
        ),
    ]  # fmt: skip


def _optimum_checks(
    inputs: Tensor,
    targets: Tensor,
    arrangement: Arrangement,
    optima: dict[float, ThresholdOptimum],
    trained: dict[float, list[StraightThrough]],
) -> list[Check]:
    gaps = max(optimum.gap / optimum.objective for optimum in optima.values())
    lowest = min(min(each.excess(optima[beta])) for beta, widths in trained.items() for each in widths)
    reached = max(
        abs(_network_loss(inputs, targets, arrangement, optimum, beta) / optimum.objective - 1)
        for beta, optimum in optima.items()
    )
    units = max(optimum.units for optimum in optima.values())
    return [
        Check("the LASSO is solved: duality gap below 1e-6 of the optimum", SOURCE, gaps < 1e-6, f"largest {gaps:.1e}"),
        Check("no straight-through network is below the certified optimum", SOURCE, lowest >= 0, f"closest: {lowest:.2%} above"),
        Check(
            "a network built from the solution has the optimum as its weight-decay loss", SOURCE, reached < 1e-9,
            f"relative difference {reached:.1e}, with directions of norm 1e-8",
        ),
        Check("the optimum needs at most n units", SOURCE, units <= len(targets), f"{units} for n = {len(targets)}"),
        Check(
            "straight-through training finds the optimum to 1 %", SOURCE, lowest < 0.01, f"best run {lowest:.2%} above", must=False
        ),
    ]  # fmt: skip


def _network_loss(
    inputs: Tensor, targets: Tensor, arrangement: Arrangement, optimum: ThresholdOptimum, beta: float
) -> float:
    """1/2 |f(X) - y|^2 + beta/2 |theta|^2 of the network itself, evaluated as one."""
    used = optimum.weights != 0
    directions = arrangement.directions[:, used]
    directions = 1e-8 * directions / directions.norm(dim=0).clamp(min=1e-300)
    root = optimum.weights[used].abs().sqrt()
    outputs = ((inputs @ directions >= 0).double() * root) @ (root * optimum.weights[used].sign())
    decay = directions.square().sum() + 2 * root.square().sum()
    return float(0.5 * (outputs - targets).square().sum() + beta / 2 * decay)


def _shattered_checks(targets: Tensor, arrangement: Arrangement, decay: Sequence[float]) -> list[Check]:
    worst = 0.0
    for beta in decay:
        closed, optimum = (
            shattered_optimum(targets, beta)[1],
            solve_threshold_network(arrangement.patterns, targets, beta),
        )
        worst = max(worst, abs(closed / optimum.objective - 1))
    n = len(targets)
    return [
        Check(f"{n} linearly independent digits are shattered", SOURCE, arrangement.count == 2**n, f"{arrangement.count} patterns"),
        Check(
            "their optimum is min_d 1/2 |d - y|^2 + beta (max (d)_+ + max (-d)_+)", SOURCE, worst < 1e-6, f"relative difference {worst:.1e}"
        ),
    ]  # fmt: skip


def _figure(
    plane: Tensor,
    targets: Tensor,
    arrangement: Arrangement,
    optima: dict[float, ThresholdOptimum],
    trained: dict[float, list[StraightThrough]],
) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    generator = torch.Generator().manual_seed(0)
    ticks, place = [], 0.0
    for beta, widths in trained.items():
        for each, colour in zip(
            widths, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple") * 9, strict=False
        ):
            excess = [100 * value for value in each.excess(optima[beta])]
            spread = place + 0.5 * (torch.rand(len(excess), generator=generator) - 0.5)
            label = f"{each.width} units" if beta == next(iter(trained)) else None
            left.scatter(spread, excess, s=14, alpha=0.7, color=colour, label=label)
            left.hlines(statistics.median(excess), place - 0.35, place + 0.35, color="black", linewidth=1)
            sampled = "convex program, random patterns" if label and each is widths[-1] else None
            left.plot(
                place, 100 * each.sampled_excess(optima[beta]), "kD", markersize=5, fillstyle="none", label=sampled
            )
            place += 1
        ticks.append((place - (len(widths) + 1) / 2, f"beta = {beta:g}\noptimum: {optima[beta].units} units"))
        place += 1
    left.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    left.set_ylabel("objective above the certified optimum, %")
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=-0.1)
    left.axhline(0, color="black", linewidth=0.8)
    left.grid(visible=True, axis="y", alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    left.set_title("Straight-through runs (line: median)", fontsize=10)

    beta = sorted(optima)[len(optima) // 2]
    axis = torch.linspace(-1.2, 1.2, 400, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="xy")
    grid = torch.stack([first.flatten(), second.flatten(), torch.ones(first.numel(), dtype=torch.float64)], 1)
    used = optima[beta].weights != 0
    values = (grid @ arrangement.directions[:, used] >= 0).double() @ optima[beta].weights[used]
    shown = right.pcolormesh(
        axis, axis, values.reshape(first.shape), cmap="coolwarm", vmin=-1.3, vmax=1.3, alpha=0.8, rasterized=True
    )
    for target, marker, name in ((-1.0, "o", "3"), (1.0, "s", "8")):
        chosen = targets == target
        colour = "tab:blue" if target < 0 else "tab:red"
        right.scatter(*plane[chosen].T, marker=marker, color=colour, edgecolor="white", label=f"digit {name}")
    figure.colorbar(shown, ax=right, label="output of the optimal network")
    right.set_xlabel("first principal component")
    right.set_ylabel("second principal component")
    right.set_title(f"A global optimum, beta = {beta:g}", fontsize=10)
    right.legend(frameon=True, fontsize=8, loc="lower left")
    return figure
