"""The conclusion of Theorem 2.1: the line between misfit and distance, and the rate, checked at every step of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.papers.oymak.hypotheses import SOURCE, Hypotheses
from lightning_conv.theory.tools.descent import Descent

SHARPER = f"{SOURCE}, with halved constants"
ROUNDING = 1e-9
"""Relative slack of comparisons between a measured and a predicted number."""


def misfits(path: Descent, scale: float) -> Tensor:
    """Compute |r_t| = sqrt(2 f_t / k), (T + 1,), of a descent on f = k S."""
    return (2 * path.losses / scale).sqrt()


def judge_line(path: Descent, hypotheses: Hypotheses, *, scale: float = 1.0) -> list[Criterion]:
    """Judge the conclusions of the theorem at every step of a run of plain gradient descent on f = k S.

    Args:
        path: A run of plain gradient descent on f.
        hypotheses: The constants, claimed or proven; alpha > 0.
        scale: Factor k with f = k S.

    Returns:
        - ``oymak_step``: the largest step against the largest that the theorem covers. If it is refuted, the other
          criteria are observations without a theorem behind them.
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
        at_most("oymak_step", SOURCE, "h <= min(1 / (2 beta^2), 1 / (2 L |r_0|))", largest, hypotheses.step * most),
        at_most("misfit_distance_line", SOURCE, papers, distance, most),
        at_most("misfit_length_line", SHARPER, sharper, length, most),
        at_most("misfit_rate", SHARPER, "|r_k|^2 <= (1 - h alpha^2)^k |r_0|^2 at every step", over, most),
    ]
