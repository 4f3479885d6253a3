"""Chatterjee's criterion on real digits: proven before the first step, obeyed at every step, and refuted where it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.recipes.lab.chatterjee.cases import Case, Laboratory, largest_curvature, positive_twin, tanh_network
from lightning_conv.recipes.lab.chatterjee.figure import draw
from lightning_conv.recipes.lab.chatterjee.wide import WideStarts, curve, wide_starts
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.theory.papers.chatterjee import (
    DescentCertificate,
    affine_independence,
    certify_descent,
    judge_path,
    positive_init_,
    smallest_output_weight,
)
from lightning_conv.theory.tools.descent import Descent

SOURCE = "Chatterjee 2203.16462"
LARGER = 1.9
"""Of the step that is not certified, in units of 1 / |Hess f(x_0)|: close to where a quadratic would diverge."""


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
    """Certify descent on a tanh network with positive weights, run it, and set it beside two starts that fail the criterion.

    Then random starts of wide two-layer networks: from which width on the criterion is proven, and a descent from the widest.

    Args:
        n: images, half of each of two classes; at most one more than pixels (digits: 65), for the bias.
        width: units of a hidden layer.
        depth: linear layers, 2 or more.
        epsilon: share of the descent that may be lost to curvature.
        until: loss at which the runs stop.
        max_steps: of each run; one that has not come down to ``until`` by then is told as such.
        small_weight: output weight of the positive start that fails.
        radii: of the balls in which small ratios are searched.
        widest: units of the largest network with random weights.
        wide_steps: of its descent, at most.
        source: of the images.
        root: folder of MNIST.
        seed: of weights, samples and directions.

    Raises:
        ValueError: a depth below 2, or images that are not independent.
    """
    if depth < 2:
        raise ValueError(f"depth: {depth}; need 2 or more linear layers")
    data = two_classes(n, source=source, root=root, seed=seed)
    model = tanh_network(data.inputs.shape[1], width, depth, seed)
    weight = smallest_output_weight(model, data.inputs, data.targets, epsilon=epsilon, seed=seed)
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
        *_certificate_checks(certificate, proven, until),
        *_a_posteriori_checks(certificate, quick),
        *_failing_checks(failing, until),
        *wide.checks(),
    ]
    independence = affine_independence(data.inputs).sigma_min
    assert independence is not None
    setting = (
        f"{n} images of {source} (3 against 8, unit norm, targets -1 and 1), a tanh network of {depth} linear layers with {width} "
        "units in each "
        f"hidden layer, all weights and biases trained in float64, f = (1/n) sum (u - y)^2. Chatterjee's positive initialisation: first "
        f"layer and biases zero, hidden weights in [1, 1.5], output weights in [A, 1.5 A]; A = {weight:.4g} is the smallest (to one "
        f"percent) for which the certificate holds. sigma_min([X, 1]) = {independence.value:.4g} is certified, so the images are affinely "
        "independent. "
        f"|Hess f(x_0)| = {curvature:.4g} by power iteration; one more run takes {LARGER:g} over that as its step, and is judged "
        f"step by step. Two starts that fail the criterion run with half a step of 1 / |Hess f(x_0)|: nobody promised them "
        "anything. Random weights: two layers, all entries from N(0, 1), biases zero, units in pairs of opposite output weights so "
        f"that u = 0 at the start; the widest, {widest} units, descends with its certified step for {wide_steps} steps at most."
    )
    return Report(
        "chatterjee", "Chatterjee's criterion: a certified descent, step by step", setting, checks,
        {"Runs": [_row(case) for case in cases], "Certificate": [_certificate_row(certificate)],
         "Random weights, by width": wide.rows()},
        draw(cases, certificate, wide), _numbers(cases, wide),
    )  # fmt: skip


def _certificate_checks(certificate: DescentCertificate, case: Case, until: float) -> list[Check]:
    path, flow, last = case.path, certificate.flow, float(case.path.losses[-1])
    checks = [
        Check(flow.asks, SOURCE, flow.verdict == "certified", f"{flow.verdict}: {flow.reason}"),
        Check(certificate.criterion.asks, SOURCE, certificate.holds, f"{certificate.criterion.verdict}: {certificate.criterion.reason}"),
        *_as_checks(path, certificate),
        Check(f"f <= {until:.0e} in the end", SOURCE, last <= until, f"{last:.3g} after {path.taken} steps"),
        Check(
            "no ratio found in a ball lies below the proven alpha", "sampling against the proof",
            all(a >= b * (1 - 1e-9) for a, b in zip(case.infima, case.proven, strict=True)),
            f"smallest found / proven: {min(a / b for a, b in zip(case.infima, case.proven, strict=True) if b):.4g}",
        ),
    ]  # fmt: skip
    return checks


def _as_checks(path: Descent, certificate: DescentCertificate) -> list[Check]:
    return [
        Check(criterion.asks, criterion.source, criterion.verdict == "consistent", criterion.reason)
        for criterion in judge_path(path, certificate=certificate)
    ]


def _a_posteriori_checks(certificate: DescentCertificate, case: Case) -> list[Check]:
    """What alpha on the ball promises to any steps whose descent was looked at: no smoothness bound is needed."""
    path = case.path
    least = float(path.efficiencies.min())
    lost = torch.log1p(-(1 - certificate.epsilon) * certificate.alpha.lower * path.steps).cumsum(0)
    share = float(((path.losses[1:] / path.losses[0]).log() - lost).exp().max())
    where = f"; step {case.step:.3g}, not certified before the run"
    descends = least >= 1 - certificate.epsilon
    return [
        Check(
            "larger step: f_t - f_{t+1} >= (1 - eps) h |grad f_t|^2, checked at every step", SOURCE, descends,
            f"smallest {least:.3g}{where}", must=False,
        ),
        Check(
            "larger step: f_k <= (1 - delta)^k f_0 and |x_k - x_0| <= r, which then follow", SOURCE,
            not descends or (share <= 1 + 1e-9 and float(path.distances.max()) <= certificate.radius),
            f"largest f_k / bound {share:.4g}, farthest {float(path.distances.max()):.3g} of {certificate.radius:.3g}",
        ),
    ]  # fmt: skip


def _failing_checks(cases: Sequence[Case], until: float) -> list[Check]:
    checks = []
    for case in cases:
        ceiling, last = case.ceiling, float(case.path.losses[-1])
        refuted = ceiling.refuted
        reach = "" if math.isinf(ceiling.refuted_to) else f" up to {ceiling.refuted_to:.3g}"
        seen = f"no radius{reach} scores above {ceiling.score:.3g}"
        if not refuted:
            seen = f"not refuted: at r = {ceiling.radius:.3g} the score is at most {ceiling.score:.3g}"
        checks += [
            Check(f"{case.name}: 4 f(x_0) < r^2 alpha(x_0, r) for some r", SOURCE, not refuted, seen, must=False),
            Check(
                f"{case.name}: f <= {until:.0e} in the end", "nobody", last <= until,
                f"{last:.3g} after {case.path.taken} steps: the criterion is sufficient, not necessary", must=False,
            ),
        ]  # fmt: skip
    return checks


def _row(case: Case) -> dict[str, Any]:
    path = case.path
    return {
        "run": case.name, "step": case.step, "steps": path.taken, "f(x_0)": float(path.losses[0]), "f in the end": float(path.losses[-1]),
        "smallest ratio on the path": float(path.running_infimum[-1]), "farthest": float(path.distances.max()),
        "path length": float(path.lengths[-1]), "least efficiency": float(path.efficiencies.min()),
        "largest curvature met": float(path.smoothness.max()), "score at most": case.ceiling.score,
    }  # fmt: skip


def _certificate_row(certificate: DescentCertificate) -> dict[str, Any]:
    return {
        "r": certificate.radius, "alpha >=": certificate.alpha.lower, "Hessian <=": certificate.smoothness,
        "step h": certificate.step, "delta per step": certificate.rate, "score (flow)": certificate.flow.measured,
        "score (descent)": certificate.score, "path length <=": certificate.length,
    }  # fmt: skip


def _numbers(cases: Sequence[Case], wide: WideStarts) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for case in cases:
        steps = torch.tensor(curve(case.path))
        curves[case.name] = {
            "step": steps.tolist(), "loss": case.path.losses[steps].tolist(), "ratio": case.path.ratios[steps].tolist(),
            "distance": case.path.distances[steps].tolist(), "length": case.path.lengths[steps].tolist(),
            "radii": case.radii, "alpha at most": case.infima, "alpha at least": case.proven,
        }  # fmt: skip
    if wide.path is not None:
        steps = torch.tensor(curve(wide.path))
        curves["random weights"] = {"step": steps.tolist(), "loss": wide.path.losses[steps].tolist()}
    return {"curves": curves}
