"""Oymak & Soltanolkotabi 2019: the line between misfit and distance, kept by one network and broken by another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.losses.objective import Objective
from lightning_conv.recipes.lab.chatterjee.cases import SECONDS_A_STEP, tanh_network
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.oymak.figure import draw
from lightning_conv.recipes.lab.oymak.findings import Case, constants, curve, proven_checks, row
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.oymak import (
    Hypotheses,
    certify_hypotheses,
    judge_hypotheses,
    judge_line,
    sampled_hypotheses,
)
from lightning_conv.theory.tools.descent import gradient_descent

SNAPSHOTS = 6


SMALL: dict[str, Any] = {"n": 4, "width": 128, "output_weight": 60.0, "until": 1e-1, "max_steps": 4000}
"""Settings with which `run` takes seconds."""


def run(
    *,
    n: int = 10,
    width: int = 256,
    output_weight: float = 30.0,
    until: float = 1e-8,
    max_steps: int = 100_000,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Prove the theorem's hypotheses for one network and check its line at every step; then run one for which it fails.

    The line bounds the misfit |r| plus a multiple of the distance from the start by the initial misfit.

    Cost: about 9 s on 2 cores with the default settings.

    Args:
        n: images, half of each of two classes.
        width: number of hidden units, even.
        output_weight: |a_j|; the larger it is, the less the Jacobian changes relative to its size.
        until: value of S / S(0), with S = (1/2) |r|^2, at which the runs stop.
        max_steps: largest number of steps of each run.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of samples and weights.

    Returns:
        The checks of the hypotheses and of the line, and tables of the runs and of the constants.

    Raises:
        ValueError: the width is odd, or the hypotheses are not proven for the output weights.
    """
    if width % 2:
        raise ValueError(f"width: {width}; need an even number, the units come in pairs")
    data = two_classes(n, source=source, root=root, seed=seed)
    model = _paired(tanh_network(data.inputs.shape[1], width, 2, seed), output_weight)
    certified = certify_hypotheses(model, data.inputs, data.targets)
    if not certified.holds:
        raise ValueError(
            f"output_weight: {output_weight:g}; nothing is proven: {certified.criterion.reason}; use a larger one, or a larger width"
        )
    objective = Objective(model, data.inputs, data.targets, _half_sum)
    proven = _case(
        "proven constants", objective, certified.hypotheses, certified.hypotheses.step, until, max_steps, seed
    )

    plain = Objective(tanh_network(data.inputs.shape[1], width, 2, seed), data.inputs, data.targets, _half_sum)
    claimed = _at_the_start(plain)
    allowed = 1 / (2 * claimed.beta**2)
    failing = [
        _case(
            f"torch's own initialisation, h = {s:g} / (2 beta_0^2)", plain, claimed, s * allowed, until, max_steps, seed
        )
        for s in (1, 2)
    ]
    checks = [
        *proven_checks(certified, proven, until),
        *(
            Check.of(each, case.name, must=False) for case in failing for each in case.criteria
        ),
    ]  # fmt: skip
    cases = [proven, *failing]
    setting = (
        f"{n} images of {source} (3 against 8, unit norm, targets -1 and 1), two-layer tanh networks with {width} hidden units, all "
        "weights trained in float64 by gradient descent on S = 1/2 sum (u - y)^2. Proven: units in pairs with the same input weights and "
        f"output weights +-{output_weight:g}, so that u = 0 at the start; constants proven on the whole ball of radius 2 |r_0| / alpha, "
        "and the step they allow. Failing: torch's own initialisation, with the singular values of its first Jacobian claimed as alpha "
        "and beta, which is what one can measure before a run, and the step 1 / (2 beta^2) that they would allow, and twice that."
    )
    return Report(
        "oymak", "Oymak and Soltanolkotabi: misfit against distance", setting, checks,
        {"Runs": [row(case) for case in cases], "Constants": [constants(case) for case in cases]},
        draw(cases), {"curves": {case.name: curve(case) for case in cases}},
    )  # fmt: skip


def _half_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return S = (1/2) sum (u - y)^2."""
    return (outputs - targets).square().sum() / 2


@torch.no_grad()
def _paired(model: nn.Sequential, output_weight: float) -> nn.Sequential:
    """Copy the input weights of unit j to unit j + m/2, with opposite output weights, so that the network is zero."""
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    half = first.out_features // 2
    first.weight[half:] = first.weight[:half]
    first.bias[half:] = first.bias[:half]
    last.weight.fill_(output_weight)
    last.weight[:, half:] = -output_weight
    last.bias.zero_()
    return model


def _at_the_start(objective: Objective) -> Hypotheses:
    """Return the constants of the first Jacobian, as if the Jacobian were constant."""
    sizes = torch.linalg.svdvals(objective.jacobian(objective.start))
    with torch.no_grad():
        misfit = float(objective.residual(objective.start).norm())
    return Hypotheses(misfit, float(sizes[-1]), float(sizes[0]), 0.0)


def _case(
    name: str, objective: Objective, claimed: Hypotheses, step: float, until: float, max_steps: int, seed: int
) -> Case:
    """Run gradient descent on S, and judge the claimed constants and the line."""
    stored: list[Tensor] = []

    def observe(t: int, x: Tensor) -> None:
        if t & (t - 1) == 0 and t >= 1:  # powers of two
            stored.append(x.clone())

    stop = until * claimed.misfit**2 / 2
    with progress_bar(name, SECONDS_A_STEP * max_steps, None) as report:
        path = gradient_descent(objective, step, steps=max_steps, until=stop, observe=observe, report=report)
    points = (*stored[:: max(1, len(stored) // SNAPSHOTS)], path.final)
    radius = min(claimed.radius, 2 * float(path.distances.max())) if claimed.radius > 0 else 1.0
    seen = sampled_hypotheses(objective, radius, points=SNAPSHOTS, path=points, seed=seed)
    return Case(name, path, claimed, seen, [*judge_hypotheses(claimed, seen), *judge_line(path, claimed)])
