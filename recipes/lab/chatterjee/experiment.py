"""Chatterjee 2022 on real digits: proven before the first step, obeyed at every step, and refuted where it fails."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.recipes.lab.chatterjee.cases import Laboratory, largest_curvature, positive_twin, tanh_network
from lightning_conv.recipes.lab.chatterjee.figure import draw
from lightning_conv.recipes.lab.chatterjee.findings import (
    a_posteriori_checks,
    certificate_checks,
    certificate_row,
    failing_checks,
    numbers,
    row,
)
from lightning_conv.recipes.lab.chatterjee.wide import wide_starts
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Report
from lightning_conv.theory.papers.chatterjee import (
    affine_independence,
    certify_descent,
    positive_init_,
    smallest_output_weight,
)

LARGER = 1.9
"""Step size of the uncertified run, in units of 1 / |Hess f(x_0)|; on a quadratic, descent diverges above 2."""


SMALL: dict[str, Any] = {"n": 4, "width": 8, "until": 1e-2, "max_steps": 3000, "radii": 3, "widest": 32}
"""Settings with which `run` takes seconds."""


def run(
    *,
    n: int = 10,
    width: int = 64,
    depth: int = 2,
    epsilon: float = 0.5,
    until: float = 1e-12,
    max_steps: int = 200_000,
    small_weight: float = 0.3,
    radii: int = 33,
    widest: int = 16_384,
    wide_steps: int = 5_000,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Certify descent on a tanh network with positive weights, run it, and compare two starts that fail the criterion.

    Then find the width from which on the criterion is proven for random two-layer networks, and descend from the
    widest.

    Cost: about 100 s on 2 cores with the default settings.

    Args:
        n: images, half of them of each of two classes; at most one more than there are pixels (digits: 65), for the
            bias.
        width: units per hidden layer.
        depth: number of linear layers, 2 or more.
        epsilon: share of the first-order decrease h |grad f|^2 of a step that curvature may cancel, in (0, 1).
        until: loss f at which the runs stop.
        max_steps: largest number of steps of each run; a run that has not reached ``until`` by then is reported as
            such.
        small_weight: output weight A of the positive initialisation for which the criterion fails.
        radii: number of balls in which the smallest ratio is searched.
        widest: units of the largest network with random weights.
        wide_steps: largest number of steps of gradient descent from that network.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of weights, samples and directions.

    Returns:
        The checks of the certificate, of the certified and the uncertified run, of the starts that fail and of random
        weights; tables of the runs, the certificate and random weights by width.

    Raises:
        ValueError: the depth is below 2, ``widest`` is no multiple of 32, or the images are not proven affinely
            independent.
    """
    if depth < 2:
        raise ValueError(f"depth: {depth}; need 2 or more linear layers")
    if widest < 32 or widest % 32:
        raise ValueError(f"widest: {widest}; need a multiple of 32, as it is halved four times and units come in pairs")
    data = two_classes(n, source=source, root=root, seed=seed)
    model = tanh_network(data.inputs.shape[1], width, depth, seed)
    try:
        weight = smallest_output_weight(model, data.inputs, data.targets, epsilon=epsilon, seed=seed)
    except ValueError as error:  # the samples are not proven independent
        raise ValueError(f"n: {error}") from error
    positive_init_(model, A=weight, seed=seed)
    certificate = certify_descent(model, data.inputs, data.targets, epsilon=epsilon)
    lab = Laboratory(data, radii, max_steps, until, seed)

    proven = lab.case(f"positive, A = {weight:.3g}, certified step", model, certificate.step, certified=certificate)
    curvature = largest_curvature(proven.objective)
    quick = lab.descend(f"the same start, step {LARGER:g} / |Hess f(x_0)|", proven, LARGER / curvature)
    failing = []
    for name, start in (
        (f"positive, A = {small_weight:.3g}", positive_twin(model, small_weight, seed)),
        ("torch's own initialisation", tanh_network(data.inputs.shape[1], width, depth, seed)),
    ):
        objective = Objective(start, data.inputs, data.targets, nn.MSELoss())
        failing.append(lab.case(name, start, 0.5 / largest_curvature(objective)))

    wide = wide_starts(data, widest, epsilon=epsilon, steps=wide_steps, until=until, seed=seed)
    cases = [proven, quick, *failing]
    checks = [
        *certificate_checks(certificate, proven, until),
        *a_posteriori_checks(certificate, quick),
        *failing_checks(failing, until),
        *wide.checks(),
    ]
    independence = affine_independence(data.inputs).sigma_min
    assert independence is not None
    setting = (
        f"{n} images of {source} (3 against 8, unit norm, targets -1 and 1), a tanh network of {depth} linear layers with {width} units "
        "in each hidden layer, all weights and biases trained in float64, f = (1/n) sum (u - y)^2. Chatterjee's positive initialisation: "
        f"first layer and biases zero, hidden weights in [1, 1.5], output weights in [A, 1.5 A]; A = {weight:.4g} is the smallest (to one "
        f"percent) for which the certificate holds. sigma_min([X, 1]) = {independence.value:.4g} is certified, so the images are affinely "
        f"independent. |Hess f(x_0)| = {curvature:.4g} by power iteration; one more run takes {LARGER:g} over that as its step, and is "
        "judged step by step. Two starts that fail the criterion run with half a step of 1 / |Hess f(x_0)|: the theorem promises nothing "
        "for them. Random weights: two layers, all entries from N(0, 1), biases zero, units in pairs of opposite output weights so that "
        f"u = 0 at the start; the widest, {widest} units, descends with its certified step for {wide_steps} steps at most."
    )
    return Report(
        "chatterjee", "Chatterjee's criterion: a certified descent, step by step", setting, checks,
        {"Runs": [row(case) for case in cases], "Certificate": [certificate_row(certificate)],
         "Random weights, by width": wide.rows()},
        draw(cases, certificate, wide), numbers(cases, wide),
    )  # fmt: skip
