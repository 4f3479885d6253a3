"""`lab du`: the limit kernels K^(H) of Du, Lee, Li, Wang, Zhai 2019 against the mean of finite widths; `--depth`: what depth costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from lightning_conv.kernels.infinite import (
    LimitKernel,
    convolutional_limit,
    fully_connected_limit,
    residual_limit,
)
from lightning_conv.networks.analytic import softplus
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du import printed
from lightning_conv.recipes.lab.du.depth import run_depth
from lightning_conv.recipes.lab.panel import dress
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.plots import new_figure
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory import DuConvResNet, DuFC, DuResNet
from lightning_conv.theory.papers.du import last_hidden_gram

SOURCE = "Du, Lee, Li, Wang, Zhai 2019 (1811.03804)"
SOFTPLUS = softplus(1.0)
Inputs = Literal["random", "digits"]

LEVEL = 1e-3
"""Probability with which right kernels would fail the check of one architecture, over all its entries and depths (Bonferroni)."""

DEFINITIONS = {"FC": "Definition 5.1", "ResNet": "Definition 6.1", "ConvResNet": "Definition 7.1"}
COLOURS = {"FC": "tab:blue", "ResNet": "tab:orange", "ConvResNet": "tab:green"}


@dataclass(frozen=True)
class Case:
    """One architecture and depth: the limit, and the kernels of random networks."""

    network: str
    depth: int
    limit: LimitKernel
    scale: float  # of the last line: c_sigma, or (c_res / H)^2
    draws: Tensor  # (draws, n, n)

    @property
    def standard_errors(self) -> Tensor:
        """Of the mean of every entry, (n, n)."""
        return self.draws.std(0) / math.sqrt(len(self.draws))

    def z(self, kernel: Tensor) -> Tensor:
        """(mean - kernel) / standard error of the entries i <= j."""
        upper = torch.triu_indices(*kernel.shape)
        return ((self.draws.mean(0) - kernel) / self.standard_errors)[upper[0], upper[1]]

    def largest_z(self, kernel: Tensor) -> float:
        """Largest |z|."""
        return float(self.z(kernel).abs().max())

    @property
    def distance(self) -> float:
        """|mean - K|_F / |K|_F."""
        return float((self.draws.mean(0) - self.limit.matrix).norm() / self.limit.matrix.norm())


def run(
    *,
    depth: bool = False,
    inputs: Inputs = "random",
    n: int = 6,
    width: int = 1024,
    draws: int = 64,
    depths: tuple[int, ...] = (2, 3, 4),
    c_res: float = 0.5,
    seed: int = 0,
) -> Report:
    """Limit kernels against finite widths, for softplus; with --depth, what depth costs.

    Args:
        depth: run the other experiment: sensitivity and lambda_0 against depth. Its own defaults are --n 10, --width 256 and
            depths 2, 4, 8, 16, 32, for settings that are left at the defaults here.
        inputs: random directions, which tell the two covariances apart, or digits, whose directions are close.
        n: samples of norm 1.
        width: m; the mean over draws is off by some 1 / m, which has to stay below the Monte Carlo error.
        draws: networks for each mean.
        depths: H, each 2 or more.
        c_res: of the residual branches.
        seed: of data and weights.

    Raises:
        ValueError: fewer than 4 draws, or depths that are not ascending from 2 on.
    """
    if list(depths) != sorted(set(depths)) or depths[0] < 2:
        raise ValueError(f"depths: {list(depths)}; need ascending ones of 2 or more")
    if depth:
        chosen = (2, 4, 8, 16, 32) if depths == (2, 3, 4) else depths
        return run_depth(
            n=10 if n == 6 else n, width=256 if width == 1024 else width, depths=chosen, c_res=c_res, seed=seed
        )
    if draws < 4:
        raise ValueError(f"draws: {draws}; need 4 or more")
    rows = two_classes(n, seed=seed).inputs if inputs == "digits" else _random_directions(n, seed)
    cases = []
    names = [(name, h) for name in DEFINITIONS for h in depths]
    with progress_bar("random networks", draws * n * 64 * 18 * width**2 * sum(depths) * 1e-10, None) as bar:
        *reports, last = equal_parts(bar, len(names) + 1)
        for (name, h), report in zip(names, reports, strict=True):
            cases.append(_case(name, h, rows, width, draws, c_res, seed))
            report(1.0)
        many = printed.MORE_DRAWS * draws
        covariance, pairing = printed.residual_rivals(rows, depths, max(width // 2, 1), many, SOFTPLUS, seed, last)
    compared = _compared(cases, covariance, pairing)
    threshold = float(stats.t.ppf(1 - LEVEL / (len(depths) * n * (n + 1)), draws - 1))
    return Report(
        name="du",
        title="Deep limit kernels agree with the mean of finite networks",
        setting=(
            f"G^(H) of {draws} random networks of width {width} (convolutional: {width // 4} channels; softplus, c_res = {c_res}) on "
            f"{n} inputs of norm 1 ({inputs}; 8 x 8 images and patches of 3 x 3 for the convolutional network), against K^(H) by the "
            f"recursion (quadrature to {max(c.limit.error for c in cases):.1g}). z: (mean - K) / standard error of an entry; |z| above "
            f"{threshold:.2f} somewhere among the {n * (n + 1) // 2} entries of all depths has probability {LEVEL} (Student's t, "
            f"{draws - 1} degrees of freedom, Bonferroni). As printed: the definitions' last line has the covariance A^(H-1), which is "
            "built from K^(H-2), here it is built from K^(H-1); Definition 6.1 pairs b_i with E sigma(u), here it is E sigma(v); the last "
            "line of 7.1 has no c_res^2 / H^2. Two kernels are told apart along their difference, less its part along K^(H), where the "
            f"networks' noise is largest; for the ResNet by {many} networks of width {max(width // 2, 1)} with c_res = {printed.C_RES}, "
            f"and for the pairing on the same directions with norms that differ by a factor of {printed.SPREAD:g}. At H = 2 the ResNet's "
            "covariances are those of FC, so it is compared from H = 3 on."
        ),
        checks=[
            *_checks(cases, threshold),
            *(printed.check(claim, source, rivals) for claim, _, source, rivals in compared),
        ],
        tables={
            "Each network": [_row(case) for case in cases],
            "What is printed": [printed.row(what, rival) for _, what, _, rivals in compared for rival in rivals],
        },
        figure=_draw(cases, threshold),
        data={
            f"{case.network} {case.depth}": {"z": case.z(case.limit.matrix), "K": case.limit.matrix} for case in cases
        },
    )


def _random_directions(n: int, seed: int) -> Tensor:
    """Unit vectors in R^64, uniform on the sphere."""
    rows = torch.randn(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _case(name: str, depth: int, rows: Tensor, width: int, draws: int, c_res: float, seed: int) -> Case:
    images = rows.view(len(rows), 1, 8, 8)
    x = images if name == "ConvResNet" else rows
    if name == "FC":
        limit = fully_connected_limit(x, depth, SOFTPLUS)
    elif name == "ResNet":
        limit = residual_limit(x, depth, SOFTPLUS, c_res=c_res)
    else:
        limit = convolutional_limit(x, depth, SOFTPLUS, c_res=c_res)
    grams = []
    for k in range(draws):
        network: DuFC | DuResNet | DuConvResNet
        if name == "FC":
            network = DuFC(64, width, depth, seed=seed + k)
        elif name == "ResNet":
            network = DuResNet(64, width, depth, c_res=c_res, seed=seed + k)
        else:
            # A quarter of the width: its 64 positions average too, and a draw costs 64 times as much.
            network = DuConvResNet(1, (8, 8), width // 4, depth, c_res=c_res, seed=seed + k)
        grams.append(last_hidden_gram(network, x))
    scale = limit.c_sigma if name == "FC" else (c_res / depth) ** 2
    return Case(name, depth, limit, scale, torch.stack(grams))


def _compared(
    cases: list[Case], covariance: list[printed.Rival], pairing: list[printed.Rival]
) -> list[tuple[str, str, str, list[printed.Rival]]]:
    """(claim, its short name, source, a rival for each depth) of every place that is looked at."""

    def of(name: str, kernel: Callable[[Case], Tensor], *, scaled: bool = False) -> list[printed.Rival]:
        mine = (case for case in cases if case.network == name)
        return [printed.Rival(name, c.depth, c.limit.matrix, kernel(c), c.draws, scaled) for c in mine]

    fully = of("FC", lambda c: printed.covariance_before(c.limit, c.scale, SOFTPLUS, len(c.limit.matrix)))
    unscaled = of("ConvResNet", lambda c: c.limit.matrix / c.scale, scaled=True)
    found = [
        ("FC: the covariance of one layer before in the last line, as the definition prints it", "covariance", DEFINITIONS["FC"], fully),
        ("ResNet: the covariance of one layer before in the last line, as the definition prints it", "covariance", DEFINITIONS["ResNet"],
         covariance),
        ("ResNet, inputs of unequal norms: b_i E sigma(u) + b_j E sigma(v), as the definition prints it", "pairing",
         DEFINITIONS["ResNet"], pairing),
        ("ConvResNet: the last line without c_res^2 / H^2, as the definition prints it", "scale", DEFINITIONS["ConvResNet"], unscaled),
    ]  # fmt: skip
    return [(claim, what, f"{SOURCE}, {source}", rivals) for claim, what, source, rivals in found if rivals]


def _row(case: Case) -> dict[str, object]:
    z = case.z(case.limit.matrix)
    along = (case.draws * case.limit.matrix).sum((1, 2)) / case.limit.matrix.square().sum()
    return {
        "network": case.network,
        "H": case.depth,
        "|mean - K|_F / |K|_F": case.distance,
        "Monte Carlo error of it": float(case.standard_errors.norm() / case.limit.matrix.norm()),
        "largest |z|": float(z.abs().max()),
        "root mean square z": float(z.square().mean().sqrt()),
        "z of <G, K>": float(along.mean() - 1) / (float(along.std()) / math.sqrt(len(along))),
        "lambda_0": case.limit.lambda_0.value,
        "order": case.limit.order,
    }


def _checks(cases: list[Case], threshold: float) -> list[Check]:
    checks = []
    for name, definition in DEFINITIONS.items():
        mine = [case for case in cases if case.network == name]
        found = [case.largest_z(case.limit.matrix) for case in mine]
        checks.append(
            Check(
                f"{name}: every entry of the mean of G^(H) is within Monte Carlo error of K^(H), largest |z| <= {threshold:.2f}",
                f"{SOURCE}, {definition}",
                max(found) <= threshold,
                ", ".join(f"H = {case.depth}: {z:.2f}" for case, z in zip(mine, found, strict=True)),
            )
        )
    return checks


def _draw(cases: list[Case], threshold: float) -> Figure:
    """z-scores of all entries, and means against limits."""
    figure = new_figure()
    figure.set_size_inches(11, 4.4)
    figure.subplots_adjust(left=0.065, right=0.985, bottom=0.13, top=0.92, wspace=0.2)
    scores, entries = figure.subplots(1, 2)
    generator = np.random.default_rng(0)
    for place, case in enumerate(cases):
        colour, shift = COLOURS[case.network], generator.uniform(-0.25, 0.25, len(case.z(case.limit.matrix)))
        label = case.network if case.depth == cases[0].depth else None
        scores.plot(place + shift, case.z(case.limit.matrix), "o", color=colour, markersize=4, alpha=0.7, label=label)
        upper = torch.triu_indices(*case.limit.matrix.shape)
        size = float(case.limit.matrix.diagonal().mean())
        pairs = [(m / size)[upper[0], upper[1]].numpy() for m in (case.limit.matrix, case.draws.mean(0))]
        error = 2 * (case.standard_errors / size)[upper[0], upper[1]].numpy()
        entries.errorbar(*pairs, yerr=error, fmt="o", color=colour, markersize=3, elinewidth=0.8, label=label)
    for level in (-threshold, threshold):
        scores.axhline(level, color="black", linestyle=":", linewidth=1)
    scores.set_ylim(-1.25 * threshold, 1.45 * threshold)  # room for the legend
    scores.set_xticks(range(len(cases)), [f"H = {case.depth}" for case in cases], fontsize=8)
    scores.legend(frameon=False, fontsize=8, loc="upper center", ncols=3)
    ends = entries.get_xlim()
    entries.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
    entries.legend(frameon=False, fontsize=9, loc="upper left")
    dress(scores, f"z of every entry (dotted: {threshold:.2f})", "", "(mean - K) / standard error")
    dress(entries, "mean of G^(H) (bars: 2 standard errors) against K^(H)", "K_ij / mean K_ii", "mean G_ij / mean K_ii")
    return figure
