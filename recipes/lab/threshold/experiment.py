"""Ergen et al. 2023: threshold networks on a few digits, the certified optimum against straight-through training."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Report
from lightning_conv.recipes.lab.threshold.figure import draw
from lightning_conv.recipes.lab.threshold.findings import (
    StraightThrough,
    arrangement_checks,
    optimum_checks,
    shattered_checks,
)
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory.papers.threshold import arrangement_patterns, solve_threshold_network

SHATTERED = 8
"""Number of samples of the shattered case, with 2^8 patterns."""


SMALL: dict[str, Any] = {"n": 6, "decay": (0.1,), "widths": (4,), "runs": 2, "steps": 30}
"""Settings with which `run` takes seconds."""


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
    """Solve the convex program for two principal components of images, and train the same problem straight-through.

    Straight-through: the backward pass replaces the derivative of the threshold, which is zero almost everywhere.

    Cost: about 33 s on 2 cores with the default settings.

    Args:
        n: images of the digits 3 and 8, half of them of each.
        decay: values of the weight decay beta.
        widths: hidden units of the straight-through networks.
        runs: number of seeds per width.
        steps: steps of Adam.
        rate: learning rate of Adam.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.

    Returns:
        The checks of the patterns, of the optimum and of the shattered case, and a table of the objectives.

    Raises:
        ValueError: there is no run, step, width or decay.
    """
    if min(runs, steps, len(decay), len(widths)) < 1:
        raise ValueError(f"runs, steps, decay, widths: {runs}, {steps}, {decay}, {widths}; need at least one of each")
    data = two_classes(n, source=source, root=root)
    plane = _principal_components(data.inputs, 2)
    inputs = torch.cat([plane, torch.ones(n, 1, dtype=torch.float64)], 1)
    arrangement = arrangement_patterns(inputs)
    optima = {beta: solve_threshold_network(arrangement.patterns, data.targets, beta) for beta in decay}
    trained: dict[float, list[StraightThrough]] = {beta: [] for beta in decay}
    pairs = [(beta, width) for beta in decay for width in widths]
    # 60 s: a rough duration; it only decides whether a bar is shown (``progress.LONG``).
    with progress_bar("straight-through training", 60.0, None) as report:
        for (beta, width), done in zip(pairs, equal_parts(report, len(pairs)), strict=True):
            descended = _straight_through(inputs, data.targets, beta, width, runs, steps, rate)
            sampled = _sampled(inputs, data.targets, beta, width, runs)
            trained[beta].append(StraightThrough(width, descended, sampled))
            done(1.0)
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
    checks = [*arrangement_checks(arrangement, n), *optimum_checks(inputs, data.targets, arrangement, optima, trained)]
    checks += shattered_checks(shattered.targets, shatter, decay)
    setting = (
        f"{n} images of {source} (3 and 8, targets -1 and 1) in their first two principal components and a column of ones; 1/2 |f(X) - "
        f"y|^2 + beta/2 |theta|^2 over two-layer networks with units s_j 1{{<v_j, x> >= 0}}. Straight-through: Adam (rate {rate:g}, "
        f"{steps} steps, {runs} seeds for each width), the derivative of a sigmoid in place of the step's, directions of norm 1; counted "
        "is the best objective that a run visited, with amplitudes balanced, which can only lower it. Beside it the convex program on "
        f"the patterns of as many random directions, for the output weights alone. The shattered case: {SHATTERED} images in all "
        f"{shattered.inputs.shape[1]} pixels."
    )
    return Report(
        "threshold", "Threshold networks: the convex optimum and straight-through training", setting, checks,
        {"Objectives": rows}, draw(plane, data.targets, arrangement, optima, trained),
        {"excess": {f"{beta:g}": {each.width: each.excess(optima[beta]) for each in trained[beta]} for beta in decay}},
    )  # fmt: skip


def _principal_components(inputs: Tensor, count: int) -> Tensor:
    """Return the coordinates of the centred rows, (n, count), scaled so that the largest is 1."""
    centred = inputs - inputs.mean(0)
    scores = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:count].T
    scaled: Tensor = scores / scores.abs().max()
    return scaled


def _straight_through(
    inputs: Tensor, targets: Tensor, beta: float, width: int, runs: int, steps: int, rate: float
) -> list[float]:
    """Return the smallest balanced objective that each of ``runs`` networks visits; all are trained side by side."""
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
    """Return the optima of the convex program on the patterns of ``width`` random directions, without training."""
    found = []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(inputs.shape[1], width, generator=generator, dtype=torch.float64)
        patterns = torch.unique((inputs @ directions >= 0).double(), dim=1)
        found.append(solve_threshold_network(patterns, targets, beta).objective)
    return found
