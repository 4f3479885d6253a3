"""Frei et al. 2023; Kou, Chen & Gu 2023: nearly orthogonal data give a network of low rank after a single step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.frei.figure import draw
from lightning_conv.recipes.lab.frei.findings import DataSet, Run, checks_of, data_row, plain, row
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.networks import LeakyTwoLayer
from lightning_conv.theory.papers.frei import (
    linear_agreement,
    margins,
    near_orthogonality,
    patterns_settle,
    stable_rank_bound,
)
from lightning_conv.theory.tools.matrix_norms import numerical_rank, stable_rank

SMALL: dict[str, Any] = {"n": 6, "test": 6, "width": 16, "steps": 40, "features": 200}
"""Settings with which `run` takes seconds."""


def run(
    n: int = 20,
    test: int = 60,
    width: int = 256,
    slopes: tuple[float, ...] = (0.5, 0.0),
    std: float = 1e-4,
    eta: float = 2.0,
    steps: int = 2000,
    features: int = 4096,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Train LeakyTwoLayer on the logistic loss (1/n) sum ln(1 + exp(-y f)), on four versions of the same images.

    Cost: about 32 s on 2 cores with the default settings.

    Args:
        n: training samples, half of each of two classes.
        test: number of test samples, on which sign f is compared with the sign of its linear part.
        width: number m of units.
        slopes: values of gamma of the leaky ReLU; 0 is the ReLU.
        std: standard deviation of the initial weights. The theorems require a small one.
        eta: step size of gradient descent on the mean loss.
        steps: steps of gradient descent.
        features: number of random Fourier features, for one of the versions.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of the initialisation and of the features.

    Returns:
        The checks of ranks, margins and signs, and tables of the four data sets and of the runs.

    Raises:
        ValueError: steps is below 2.
    """
    if steps < 2:
        raise ValueError(f"steps: {steps}; need 2 or more")
    images = two_classes(n + test, source=source, root=root)
    y = images.targets[:n]
    sets = data_sets(images.inputs, n, features, seed)
    runs = []
    # 60 s: a rough duration; it only decides whether a bar is shown (``progress.LONG``).
    with progress_bar("training", 60.0, None) as report:
        for k, (data, slope) in enumerate((data, slope) for slope in slopes for data in sets):
            net = LeakyTwoLayer(data.train.shape[1], width, slope=slope, std=std, seed=seed)
            runs.append(_train(net, data, y, eta, steps))
            report((k + 1) / len(sets) / len(slopes))
    setting = (
        f"{n} images of {source} (3 against 8) in four versions: as they are; less their mean; whitened (x -> (X^T X)^(-1/2) x, which "
        f"makes the training inputs orthonormal); and {features} random Fourier features of a bandwidth so narrow that they keep little "
        f"but each image's identity. All inputs are scaled to norm 1. f = sum a_j phi(w_j . x), a_j = +-1/sqrt m fixed, m = {width}, phi "
        f"= max(gamma z, z), w_j ~ N(0, {std:g}^2 I); logistic loss, mean over the samples, plain gradient descent, eta = {eta:g}, "
        f"{steps} steps; float64. Images as they are are far from orthogonal: for them the theorems are not applicable, and their results "
        "are only reported. Frei et al. prove their limit for gradient flow (rank at most two, equal margins), and a low stable rank "
        "from the first step on for gradient descent with a smoothed leaky ReLU and a small start; Kou et al. treat gradient descent and "
        "the ReLU too. What must hold here at every finite step is derived beside: a bound of the stable rank of W - W(0) from the "
        "spectrum of X X^T, and rank two of what moves once every unit's sign on every sample is certain."
    )
    return Report(
        name="frei",
        title="Frei et al. 2023: nearly orthogonal data, low rank",
        setting=setting,
        checks=checks_of(runs),
        tables={"Data": [data_row(data, slopes) for data in sets], "Training": [row(r) for r in runs]},
        figure=draw(runs),
        data={"runs": [plain(r) for r in runs]},
    )


def data_sets(images: Tensor, n: int, features: int, seed: int) -> list[DataSet]:
    """Return the four versions of the images; every map is computed from the first n and applied to all."""
    mean = images[:n].mean(0)
    values, vectors = torch.linalg.eigh(images[:n].T @ images[:n])
    kept = values > 1e-10 * values[-1]
    whitening = vectors[:, kept] / values[kept].sqrt() @ vectors[:, kept].T
    generator = torch.Generator().manual_seed(seed)
    frequencies = 30 * torch.randn(images.shape[1], features, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(features, generator=generator, dtype=torch.float64)
    versions = {
        "images": images,
        "centred": images - mean,
        "whitened": images @ whitening,
        "Fourier features": torch.cos(images @ frequencies + phases),
    }
    found = []
    for name, x in versions.items():
        unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        found.append(DataSet(name, unit[:n], unit[n:], near_orthogonality(unit[:n])))
    return found


def _stable_rank(matrix: Tensor) -> float:
    """Return |A|_F^2 / |A|_2^2 from all singular values; an estimate of |A|_2 would be too coarse for the bound."""
    squares = torch.linalg.svdvals(matrix).square()
    return float(squares.sum() / squares[0])


def _train(net: LeakyTwoLayer, data: DataSet, y: Tensor, eta: float, steps: int) -> Run:
    """Train one network on one data set, and measure it on the way."""
    x = data.train
    probes = {0, 1, 2, steps} | {round(steps ** (k / 24)) for k in range(25)}
    looked = {0: 0, 1: 0, steps: 0}
    times, ranks, spreads, movement, bounds = [], [], [], [], []
    weight = net.hidden.weight
    start, then = net.weight.clone(), net.weight.clone()
    scale, reach = eta / len(x) / math.sqrt(len(start)), float((start @ x.T).abs().max())
    derivatives = torch.zeros(len(x), dtype=torch.float64)  # A_i
    settled: int | None = None
    for step in range(steps + 1):
        f = net(x).flatten()
        if step and not patterns_settle(data.orthogonality, net.slope, derivatives, scale, reach):
            settled = None
        elif step and settled is None:
            settled, then = step, net.weight.clone()
        if step in probes:
            times.append(step)
            ranks.append(stable_rank(weight).value)
            spreads.append(margins(f, y).spread)
            movement.append(_stable_rank(net.weight - start) if step else math.nan)
            bounds.append(stable_rank_bound(x, net.slope, derivatives) if step else math.nan)
        if step in looked:
            looked[step] = numerical_rank(weight)
        if step < steps:
            derivatives += torch.sigmoid(-y * f.detach())
            (gradient,) = torch.autograd.grad(torch.nn.functional.softplus(-y * f).mean(), weight)
            with torch.no_grad():
                weight.sub_(gradient, alpha=eta)
    with torch.no_grad():
        final = margins(net(x), y, norm=float(weight.norm()))
        linear = linear_agreement(net(data.test), data.test, net.linear_part())
    values = torch.linalg.svdvals(net.weight - then)
    third = float(values[2] / values[0]) if settled is not None and settled < steps else math.nan
    turned = int((net.weight @ x.T * net.a[:, None] * y <= 0).sum())  # type: ignore[index]
    return Run(data, net.slope, times, ranks, spreads, movement, bounds, settled, third, turned, looked, final, linear)
