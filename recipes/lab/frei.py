"""Frei et al. 2023 and Kou, Chen & Gu 2023: nearly orthogonal data give a network of low rank, after a single step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.progress import progress_bar
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.implicit_bias import (
    FREI,
    KOU,
    Margins,
    NearOrthogonality,
    linear_agreement,
    margins,
    near_orthogonality,
)
from lightning_conv.theory.matrix_norms import numerical_rank, stable_rank
from lightning_conv.theory.networks import LeakyTwoLayer


@dataclass(frozen=True)
class DataSet:
    """Training and test inputs after one map, rows of norm 1 in training."""

    name: str
    train: Tensor
    test: Tensor
    orthogonality: NearOrthogonality


@dataclass(frozen=True)
class Run:
    """One network on one data set."""

    data: DataSet
    slope: float
    steps: list[int]
    stable_ranks: list[float]
    spreads: list[float]  # smallest over largest margin
    ranks: dict[int, int]  # step -> singular values above 1e-3 of the largest
    margins: Margins  # at the end, over |W|_F
    linear: float  # share of the test samples on which sign f = sign of the linear part

    @property
    def criterion(self) -> Criterion:
        """Whether the data satisfy the condition: Frei et al.'s for a leaky ReLU, Kou et al.'s with C = 1 for the ReLU."""
        return self.data.orthogonality.criteria(self.slope)[-1]

    @property
    def covered(self) -> bool:
        """Whether the hypothesis about the data holds."""
        return self.criterion.verdict == "certified"


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
    """Train LeakyTwoLayer with the logistic loss (1/n) sum ln(1 + exp(-y f)) by plain gradient descent on four versions of the same images.

    Args:
        n: training samples, half of each of two classes.
        test: further samples, for the decision boundary.
        width: m.
        slopes: gamma of the leaky ReLU; 0 is the ReLU.
        std: of the initial weights. The theorems ask for a small one.
        eta: step size.
        steps: of gradient descent.
        features: random Fourier features, for one of the versions.
        source: of the images.
        root: folder of MNIST.
        seed: of the initialisation and of the features.

    Raises:
        ValueError: steps is below 2.
    """
    if steps < 2:
        raise ValueError(f"steps: {steps}; need 2 or more")
    images = two_classes(n + test, source=source, root=root)
    y = images.targets[:n]
    sets = data_sets(images.inputs, n, features, seed)
    runs = []
    with progress_bar("training", 60.0, None) as report:
        for k, (data, slope) in enumerate((data, slope) for slope in slopes for data in sets):
            net = LeakyTwoLayer(data.train.shape[1], width, slope=slope, std=std, seed=seed)
            runs.append(_train(net, data, y, eta, steps))
            report((k + 1) / len(sets) / len(slopes))
    setting = (
        f"{n} images of {source} (3 against 8) in four versions: as they are; less their mean; whitened (x -> "
        f"(X^T X)^(-1/2) x, which makes the training inputs orthonormal); and {features} random Fourier features "
        "of a bandwidth so narrow that they keep little but each image's identity. All inputs are scaled to norm "
        f"1. f = sum a_j phi(w_j . x), a_j = +-1/sqrt m fixed, m = {width}, phi = max(gamma z, z), w_j ~ N(0, "
        f"{std:g}^2 I); logistic loss, mean over the samples, plain gradient descent, eta = {eta:g}, {steps} "
        "steps; float64. Images as they are are far from orthogonal: for them the theorems are not applicable, "
        "and what happens to them is told beside. Frei et al. prove their limit for gradient flow (rank at most "
        "two, equal margins), and a low stable rank from the first step on for gradient descent with a smoothed "
        "leaky ReLU and a small start; Kou et al. treat gradient descent and the ReLU too."
    )
    return Report(
        name="frei",
        title="Frei et al. 2023: nearly orthogonal data, low rank",
        setting=setting,
        checks=_checks(runs),
        tables={"Data": [_data_row(data, slopes) for data in sets], "Training": [_row(r) for r in runs]},
        figure=_draw(runs),
        data={"runs": [_plain(r) for r in runs]},
    )


def data_sets(images: Tensor, n: int, features: int, seed: int) -> list[DataSet]:
    """The four versions; every map is made from the first n images and applied to all."""
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


def _train(net: LeakyTwoLayer, data: DataSet, y: Tensor, eta: float, steps: int) -> Run:
    x = data.train
    probes = {0, 1, 2, steps} | {round(steps ** (k / 24)) for k in range(25)}
    looked = {0: 0, 1: 0, steps: 0}
    times, ranks, spreads = [], [], []
    weight = net.hidden.weight
    for step in range(steps + 1):
        f = net(x).flatten()
        if step in probes:
            times.append(step)
            ranks.append(stable_rank(weight).value)
            spreads.append(margins(f, y).spread)
        if step in looked:
            looked[step] = numerical_rank(weight)
        if step < steps:
            (gradient,) = torch.autograd.grad(torch.nn.functional.softplus(-y * f).mean(), weight)
            with torch.no_grad():
                weight.sub_(gradient, alpha=eta)
    with torch.no_grad():
        final = margins(net(x), y, norm=float(weight.norm()))
        linear = linear_agreement(net(data.test), data.test, net.linear_part())
    return Run(data, net.slope, times, ranks, spreads, looked, final, linear)


def _checks(runs: Sequence[Run]) -> list[Check]:
    covered, others = [r for r in runs if r.covered], [r for r in runs if not r.covered]
    leaky = [r for r in covered if r.slope > 0]

    def said(chosen: Sequence[Run], value: Callable[[Run], str]) -> str:
        return "; ".join(f"{r.data.name}, gamma {r.slope:g}: {value(r)}" for r in chosen) or "no run"

    def ranks(r: Run) -> str:
        early, late = r.stable_ranks[r.steps.index(1)], max(r.stable_ranks[1:])
        return f"{r.stable_ranks[0]:.1f} before, {early:.2f} after, {late:.2f} at most later"

    most = max((max(r.stable_ranks[1:]) for r in covered), default=math.nan)
    flow, descent = f"{FREI}, theorem on gradient flow (in the limit)", f"{FREI}, theorem on gradient descent; {KOU}"
    return [
        # Where the condition on the data is not met the theorems say nothing: no check, only the tables.
        Check("some data satisfy the condition on near-orthogonality (for the others: not applicable)", f"{FREI}; {KOU}", bool(leaky),
              "not applicable: " + said(others, lambda r: f"kappa {r.criterion.measured:.3g}, needs {r.criterion.bound:.3g}")),
        Check("one step brings the stable rank to 4 or less, and there it stays", descent, most <= 4, said(covered, ranks), must=False),
        Check("two singular values at most above 1e-3 of the largest at the end (leaky ReLU)", flow,
              bool(leaky) and all(r.ranks[r.steps[-1]] <= 2 for r in leaky), said(leaky, lambda r: f"{r.ranks[r.steps[-1]]}"), must=False),
        Check("the margins of all samples agree to 5 % at the end", f"{FREI}; {KOU} (in the limit)",
              bool(covered) and all(r.spreads[-1] > 0.95 for r in covered), said(covered, lambda r: f"{r.spreads[-1]:.4f}"), must=False),
        Check("the boundary is linear: sign f(x) = sign(sum a_j w_j . x) on all test images (leaky ReLU)", flow,
              bool(leaky) and all(r.linear == 1 for r in leaky), said(leaky, lambda r: f"{r.linear:.3f}"), must=False),
    ]  # fmt: skip


def _data_row(data: DataSet, slopes: Sequence[float]) -> dict[str, object]:
    found = data.orthogonality
    row: dict[str, object] = {"data": data.name, "dimension": data.train.shape[1], "kappa": found.kappa.value}
    for slope in slopes:
        for criterion in found.criteria(slope):
            if slope > 0 or criterion.source == KOU:
                row[f"{criterion.name}, {criterion.bound:.3g}"] = criterion.verdict
    return row


def _row(r: Run) -> dict[str, object]:
    at_one = r.steps.index(1)
    return {
        "data": r.data.name,
        "gamma": r.slope,
        "hypothesis": "holds" if r.covered else "not applicable",
        "stable rank, start": r.stable_ranks[0],
        "after one step": r.stable_ranks[at_one],
        "end": r.stable_ranks[-1],
        "rank (1e-3), start": r.ranks[0],
        "rank, one step": r.ranks[1],
        "rank, end": r.ranks[r.steps[-1]],
        "margin / |W|_F, least": r.margins.smallest,
        "margin spread": r.margins.spread,
        "linear on test": r.linear,
    }


def _plain(r: Run) -> dict[str, object]:
    return {"data": r.data.name, "slope": r.slope, "steps": r.steps, "stable_rank": r.stable_ranks, "spread": r.spreads}


def _draw(runs: Sequence[Run]) -> Figure:
    slopes = sorted({r.slope for r in runs}, reverse=True)
    figure = Figure(figsize=(10.5, 3.6 * len(slopes)), layout="constrained")
    panels = figure.subplots(len(slopes), 2, squeeze=False)
    names = list(dict.fromkeys(r.data.name for r in runs))
    for row, slope in zip(panels, slopes, strict=True):
        for r in (r for r in runs if r.slope == slope):
            style = {"color": f"C{names.index(r.data.name)}", "linestyle": "-" if r.covered else "--", "linewidth": 1.4}
            steps = [max(step, 0.5) for step in r.steps]
            row[0].plot(steps, r.stable_ranks, label=r.data.name + ("" if r.covered else " (not applicable)"), **style)
            row[1].plot(steps, r.spreads, **style)
        kind = f"leaky ReLU, gamma = {slope:g}" if slope else "ReLU"
        row[0].set(xscale="log", yscale="log", ylabel=r"stable rank $|W|_F^2 / |W|_2^2$", title=kind)
        row[1].set(xscale="log", ylim=(-0.05, 1.05), ylabel="smallest / largest margin", title=kind)
        row[0].legend(frameon=False, fontsize=8)
        for axes in row:
            axes.set_xlabel("step (0.5 stands for the start)")
            axes.grid(visible=True, alpha=0.3)
            axes.title.set_fontsize(10)
    return figure
