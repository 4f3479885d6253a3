"""The conclusion of Theorem 2.1: the line between misfit and distance, and the rate, checked at every step of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.papers.oymak.hypotheses import SOURCE, Hypotheses
from lightning_conv.theory.tools.descent import Descent

STEP = "h <= min(1, alpha^2 / (L |r_0|)) / (2 beta^2)"
SHARPER = f"{SOURCE}, with halved constants"
ROUNDING = 1e-9
"""Relative slack of comparisons between a measured and a predicted number."""


def misfits(path: Descent, scale: float) -> Tensor:
    """Compute |r_t| = sqrt(2 f_t / k), (T + 1,), of a descent on f = k S."""
    return (2 * path.losses / scale).sqrt()


def judge_step(step: float, hypotheses: Hypotheses) -> Criterion:
    """Judge ``oymak_step``, the step condition of Theorem 2.1: h <= min(1, alpha^2 / (L |r_0|)) / (2 beta^2).

    Without L only the first factor can be judged: a step above 1 / (2 beta^2) is refuted, any other one is undecided.

    Args:
        step: Largest step h on S that was taken.
        hypotheses: The constants; ``lipschitz`` is NaN if L is not known.
    """
    if not math.isnan(hypotheses.lipschitz):
        return at_most("oymak_step", SOURCE, STEP, step, hypotheses.papers_step * (1 + ROUNDING))
    found = at_most("oymak_step", SOURCE, STEP, step, replace(hypotheses, lipschitz=0.0).papers_step * (1 + ROUNDING))
    if found.verdict != "consistent":
        return found
    return replace(
        found,
        verdict="undecided",
        reason=f"{step:.4g} is at most 1 / (2 beta^2) = {found.bound:.4g}, but L, the Lipschitz constant of J on the ball, is not known, "
        "so the factor min(1, alpha^2 / (L |r_0|)) is not",
    )


def judge_line(path: Descent, hypotheses: Hypotheses, *, scale: float = 1.0) -> list[Criterion]:
    """Judge the conclusions of the theorem at every step of a run of plain gradient descent on f = k S.

    Args:
        path: A run of plain gradient descent on f.
        hypotheses: The constants, claimed or proven; alpha > 0.
        scale: Factor k with f = k S.

    Returns:
        The criteria.

        - ``oymak_step``: the largest step against the largest that the theorem covers, its whole condition
          h <= min(1, alpha^2 / (L |r_0|)) / (2 beta^2). It is ``undecided`` if L is not known (NaN). If it is refuted, the
          line of the paper is an observation without a theorem behind it; the sharper statements allow steps up to
          ``Hypotheses.step``.
        - ``misfit_distance_line``: the line of the paper, with 1/4.
        - ``misfit_length_line``, ``misfit_rate``: the sharper line for the path length, and the full rate.

    Raises:
        ValueError: alpha is 0.
    """
    if not hypotheses.alpha > 0:
        raise ValueError("hypotheses: alpha is 0; the theorem needs alpha > 0")
    r = misfits(path, scale)
    distance, length = (
        float((share * hypotheses.alpha * far + r)[1:].max()) / hypotheses.misfit if path.taken else 1.0
        for share, far in ((0.25, path.distances), (0.5, path.lengths))
    )
    steps = path.steps * scale
    allowed = torch.log1p(-(steps * hypotheses.alpha**2).clamp(max=1 - 1e-15)).cumsum(0)
    over = float((2 * (r[1:] / r[0]).log() - allowed).exp().max()) if path.taken else 0.0
    largest = float(steps.max()) if path.taken else 0.0
    most = 1 + ROUNDING
    papers = "(1/4) alpha |theta_k - theta_0| + |r_k| <= |r_0| at every step"
    sharper = "(1/2) alpha (path length) + |r_k| <= |r_0| at every step"
    return [
        judge_step(largest, hypotheses),
        at_most("misfit_distance_line", SOURCE, papers, distance, most),
        at_most("misfit_length_line", SHARPER, sharper, length, most),
        at_most("misfit_rate", SHARPER, "|r_k|^2 <= (1 - h alpha^2)^k |r_0|^2 at every step", over, most),
    ]
