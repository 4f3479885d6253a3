"""Cost of depth: the fully connected network and the residual one of Du, Lee, Li, Wang, Zhai 2019, against depth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du.architectures import limit_kernel, network, require_ascending
from lightning_conv.recipes.lab.du.depth_figure import draw
from lightning_conv.recipes.lab.du.depth_findings import (
    ACTIVATIONS,
    DRAWS,
    Depth,
    checks_of,
    cost_law,
    law_row,
    of,
    row,
    sensitivity_law,
)
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory import DuFC
from lightning_conv.theory.papers.du import feature_sensitivity, last_hidden_gram, propagation_bound

SAMPLES = 3
"""Number of samples whose sensitivity is computed, which is the expensive part."""


SMALL: dict[str, Any] = {"n": 4, "width": 48, "depths": (2, 4, 8)}
"""Settings with which `run` takes seconds."""


def run(
    *, n: int = 10, width: int = 256, depths: tuple[int, ...] = (2, 4, 8, 16, 32), c_res: float = 0.5, seed: int = 0
) -> Report:
    """Measure the sensitivity of the last features, lambda_0 and the distance to the limit kernel against depth.

    Cost: about 15 s on 2 cores with the default settings.

    Args:
        n: number of samples.
        width: number m of units per layer.
        depths: values of H, ascending, each 2 or more.
        c_res: factor c_res of the residual network.
        seed: seed of data and weights.

    Returns:
        The checks of the growth with depth, and tables of the networks and of the laws fitted to all depths.

    Raises:
        ValueError: the depths are not ascending from 2 on.
    """
    require_ascending(depths)
    x = two_classes(n, seed=seed).inputs
    found: list[Depth] = []
    cases = [(net, act, h) for net in ("FC", "ResNet") for act in ACTIVATIONS for h in depths]
    flops = 2 * len(ACTIVATIONS) * SAMPLES * 6 * width**3 * sum(depths)
    # The duration (1e-10 s per operation) only decides whether a bar is shown.
    with progress_bar("depths", flops * 1e-10, None) as bar:
        for (net, act, h), report in zip(cases, equal_parts(bar, len(cases)), strict=True):
            found.append(_measure(net, act, h, x, width, c_res, seed))
            report(1.0)
    return Report(
        name="du_depth",
        title="What depth costs: the fully connected network pays, the residual one does not",
        setting=_setting(n, width, c_res),
        checks=checks_of(found),
        tables={
            "Each network": [row(each) for each in found],
            "Exponential or power law, fitted to all depths": [
                law_row(net, act, what, law(of(found, net, act)))
                for net in ("FC", "ResNet")
                for act in ACTIVATIONS
                for what, law in (("sensitivity", sensitivity_law), ("cost", cost_law))
            ],
        },
        figure=draw(found),
        data={"sensitivity": {f"{d.network} {d.activation} {d.depth}": d.sensitivity for d in found}},
    )


def _measure(net: str, act: str, depth: int, x: Tensor, width: int, c_res: float, seed: int) -> Depth:
    """Measure one architecture, activation and depth."""
    activation = ACTIVATIONS[act]
    limit = limit_kernel(net, x, depth, activation, c_res)
    size, gaps, sensitivity, bound = float(torch.linalg.matrix_norm(limit.matrix, 2)), [], 0.0, math.nan
    for k in range(DRAWS):
        drawn = network(net, x.shape[1], width, depth, activation, c_res, seed + k)
        gaps.append(float(torch.linalg.matrix_norm(last_hidden_gram(drawn, x) - limit.matrix, 2)) / size)
        if k == 0:
            sensitivity = float(feature_sensitivity(drawn, x[:SAMPLES]).max())
            bound = propagation_bound(drawn) if isinstance(drawn, DuFC) else math.nan
    return Depth(net, act, depth, sensitivity, bound, limit, sum(gaps) / DRAWS)


def _setting(n: int, width: int, c_res: float) -> str:
    return (
        f"Networks of width {width} at their start, {n} digits (classes 3 and 8) of norm 1, c_res = {c_res}. Sensitivity: the largest "
        "movement of x^(H), to first order, when the weights of all layers together move by sqrt(m) R, over R, the largest of "
        f"{SAMPLES} samples (the quantity that Lemma B.3 bounds; the proof's constant grows exponentially with H for the fully "
        "connected network). lambda_0: of K^(H), by the recursion. The drift of the kernel is of the order of the sensitivity times R "
        "times K_ii, and has to stay below lambda_0 / 4: so the radius R that the proof leaves the weights shrinks like 1 / cost, with "
        "cost = sensitivity * (mean K_ii) / lambda_0. "
        "Whether something grows exponentially or like a power is decided by fitting both laws to all depths: one fits if its residual is "
        "at most half of the other's, otherwise the two are not told apart; what changes by less than a factor 1.5 is flat. "
        f"Distance to the limit: mean of {DRAWS} draws. softplus and tanh are smooth, as the theorems ask; relu is not."
    )
