"""The findings of `lightning-conv lab chatterjee`: checks, rows of the tables and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_conv.recipes.lab.chatterjee.cases import Case
from lightning_conv.recipes.lab.chatterjee.wide import WideStarts
from lightning_conv.recipes.lab.report import Check, log_spaced
from lightning_conv.theory.papers.chatterjee import DescentCertificate, judge_path

SOURCE = "Chatterjee 2203.16462"


def certificate_checks(certificate: DescentCertificate, case: Case, until: float) -> list[Check]:
    """Check the certificate, and every bound that it implies for the certified descent."""
    path, flow, last = case.path, certificate.flow, float(case.path.losses[-1])
    return [
        Check(flow.asks, SOURCE, flow.verdict == "certified", f"{flow.verdict}: {flow.reason}"),
        Check(certificate.criterion.asks, SOURCE, certificate.holds, f"{certificate.criterion.verdict}: {certificate.criterion.reason}"),
        *(Check.of(criterion) for criterion in judge_path(path, certificate=certificate)),
        Check(f"f <= {until:.0e} in the end", SOURCE, last <= until, f"{last:.3g} after {path.taken} steps"),
        Check(
            "no ratio found in a ball lies below the proven alpha", "sampling against the proof",
            all(a >= b * (1 - 1e-9) for a, b in zip(case.infima, case.proven, strict=True)),
            f"smallest found / proven: {min(a / b for a, b in zip(case.infima, case.proven, strict=True) if b):.4g}",
        ),
    ]  # fmt: skip


def a_posteriori_checks(certificate: DescentCertificate, case: Case) -> list[Check]:
    """Check the bounds that alpha implies once the decrease of each step is measured; no smoothness bound is needed."""
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


def failing_checks(cases: Sequence[Case], until: float) -> list[Check]:
    """Check that the criterion is refuted for the other starts, and report their final losses."""
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


def row(case: Case) -> dict[str, Any]:
    """Return the table row of one run: column -> number (steps, losses, ratio, distances, score)."""
    path = case.path
    return {
        "run": case.name, "step": case.step, "steps": path.taken, "f(x_0)": float(path.losses[0]), "f in the end": float(path.losses[-1]),
        "smallest ratio on the path": float(path.running_infimum[-1]), "farthest": float(path.distances.max()),
        "path length": float(path.lengths[-1]), "least efficiency": float(path.efficiencies.min()),
        "largest curvature met": float(path.smoothness.max()), "score at most": case.ceiling.score,
    }  # fmt: skip


def certificate_row(certificate: DescentCertificate) -> dict[str, Any]:
    """Return the table row of the certificate: column -> number (radius, alpha, step, rate, scores, path length)."""
    return {
        "r": certificate.radius, "alpha >=": certificate.alpha.lower, "Hessian <=": certificate.smoothness,
        "step h": certificate.step, "delta per step": certificate.rate, "score (flow)": certificate.flow.measured,
        "score (descent)": certificate.score, "path length <=": certificate.length,
    }  # fmt: skip


def numbers(cases: Sequence[Case], wide: WideStarts) -> dict[str, Any]:
    """Return the curves for the JSON file: for each run its losses, ratios and distances by step, and alpha by radius."""
    curves: dict[str, Any] = {}
    for case in cases:
        steps = torch.tensor(log_spaced(case.path.taken, 120))
        curves[case.name] = {
            "step": steps.tolist(), "loss": case.path.losses[steps].tolist(), "ratio": case.path.ratios[steps].tolist(),
            "distance": case.path.distances[steps].tolist(), "length": case.path.lengths[steps].tolist(),
            "radii": case.radii, "alpha at most": case.infima, "alpha at least": case.proven,
        }  # fmt: skip
    if wide.path is not None:
        steps = torch.tensor(log_spaced(wide.path.taken, 120))
        curves["random weights"] = {"step": steps.tolist(), "loss": wide.path.losses[steps].tolist()}
    return {"curves": curves}
