"""The limit kernels K^(H) of Du, Lee, Li, Wang, Zhai 2019 against the mean of networks of finite width."""

from __future__ import annotations

from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor

from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du import printed
from lightning_conv.recipes.lab.du.architectures import (
    SOFTPLUS,
    convolutional_network,
    limit_kernel,
    network,
    require_ascending,
)
from lightning_conv.recipes.lab.du.limit_figure import draw
from lightning_conv.recipes.lab.du.limit_findings import DEFINITIONS, Case, checks_of, comparisons, row
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory.papers.du import last_hidden_gram

Inputs = Literal["random", "digits"]

LEVEL = 1e-3
"""Probability with which correct kernels fail the check of one architecture (Bonferroni over entries and depths)."""


SMALL: dict[str, Any] = {"n": 4, "width": 64, "draws": 4, "depths": (2, 3)}
"""Settings with which `run` takes seconds."""


def run(
    *,
    inputs: Inputs = "random",
    n: int = 6,
    width: int = 1024,
    draws: int = 64,
    depths: tuple[int, ...] = (2, 3, 4),
    c_res: float = 0.5,
    seed: int = 0,
) -> Report:
    """Compare limit kernels with the mean kernel of random finite networks, for softplus.

    Cost: about 78 s on 2 cores with the default settings.

    Args:
        inputs: random directions, which tell the two covariances apart, or digits, whose directions are close.
        n: number of samples, of norm 1.
        width: number m of units; the mean over draws is off by about 1 / m, which has to stay below the Monte Carlo
            error.
        draws: number of networks per mean.
        depths: values of H, ascending, each 2 or more.
        c_res: factor c_res of the residual branches.
        seed: seed of data and weights.

    Returns:
        The checks of the limits and of the kernels as printed in the paper, and tables of the networks and of what is
        printed.

    Raises:
        ValueError: there are fewer than 4 draws, or the depths are not ascending from 2 on.
    """
    require_ascending(depths)
    if draws < 4:
        raise ValueError(f"draws: {draws}; need 4 or more")
    rows = two_classes(n, seed=seed).inputs if inputs == "digits" else _random_directions(n, seed)
    cases = []
    names = [(name, h) for name in DEFINITIONS for h in depths]
    # The duration (1e-10 s per operation) only decides whether a bar is shown.
    with progress_bar("random networks", draws * n * 64 * 18 * width**2 * sum(depths) * 1e-10, None) as bar:
        *reports, last = equal_parts(bar, len(names) + 1)
        for (name, h), report in zip(names, reports, strict=True):
            cases.append(_case(name, h, rows, width, draws, c_res, seed))
            report(1.0)
        many = printed.MORE_DRAWS * draws
        covariance, pairing = printed.residual_rivals(rows, depths, max(width // 2, 1), many, SOFTPLUS, seed, last)
    compared = comparisons(cases, covariance, pairing)
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
            *checks_of(cases, threshold),
            *(printed.check(claim, source, rivals) for claim, _, source, rivals in compared),
        ],
        tables={
            "Each network": [row(case) for case in cases],
            "What is printed": [printed.row(what, rival) for _, what, _, rivals in compared for rival in rivals],
        },
        figure=draw(cases, threshold),
        data={
            f"{case.network} {case.depth}": {"z": case.z(case.limit.matrix), "K": case.limit.matrix} for case in cases
        },
    )


def _random_directions(n: int, seed: int) -> Tensor:
    """Return unit vectors in R^64, uniform on the sphere."""
    rows = torch.randn(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _case(name: str, depth: int, rows: Tensor, width: int, draws: int, c_res: float, seed: int) -> Case:
    """Compute the limit kernel of one architecture and depth, and the kernels of random networks."""
    images = rows.view(len(rows), 1, 8, 8)
    x = images if name == "ConvResNet" else rows
    limit, grams = limit_kernel(name, x, depth, SOFTPLUS, c_res), []
    for seed_k in range(seed, seed + draws):
        drawn = (
            # A quarter of the width: its 64 positions average too, and a draw costs 64 times as much.
            convolutional_network(width // 4, depth, SOFTPLUS, c_res, seed_k)
            if name == "ConvResNet"
            else network(name, 64, width, depth, SOFTPLUS, c_res, seed_k)
        )
        grams.append(last_hidden_gram(drawn, x))
    scale = limit.c_sigma if name == "FC" else (c_res / depth) ** 2
    return Case(name, depth, limit, scale, torch.stack(grams))
