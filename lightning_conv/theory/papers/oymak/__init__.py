r"""Oymak and Soltanolkotabi's line between misfit and distance (1812.10004): hypotheses and conclusions.

Everything is in the scale of S = 1/2 |u - y|^2 = 1/2 |r|^2 (``LossScale.step_on_sum`` converts steps). J = du/dtheta is
the Jacobian of the N outputs, (N, P), and h the step size.

Theorem 2.1: let alpha <= sigma_min(J), |J|_2 <= beta and |J(t2) - J(t1)|_2 <= L |t2 - t1| on the ball of radius 4
|r_0| / alpha around theta_0, and let h <= min(1, alpha^2 / (L |r_0|)) / (2 beta^2). Then

.. math:: |r_k|^2 \le (1 - h \alpha^2 / 2)^k |r_0|^2, \qquad \tfrac14 \alpha |\theta_k - \theta_0| + |r_k| \le |r_0|,

and the path is at most 4 |r_0| / alpha long.

The constants can be halved. With J' the mean of J along a step, r_{k+1} = r - h J' J^T r and
|J' - J| <= L h |J^T r| / 2, so

.. math:: |r_{k+1}|^2 \le |r|^2 - 2h \bigl(1 - \tfrac12 L h |r|\bigr) |J^T r|^2 + h^2 \beta^2 |J^T r|^2 \le |r|^2 - h |J^T r|^2

for h <= 1 / (2 beta^2) and h <= 1 / (2 L |r_0|). With |J^T r| >= alpha |r| every step reduces |r|^2 by at least a share
h alpha^2, and |r_{k+1}| <= |r| - (alpha / 2) h |J^T r|, hence (1/2) alpha (path length) + |r_k| <= |r_0|. So no step
leaves the ball of radius 2 |r_0| / alpha, and the constants are needed only there. [derived]
"""

from lightning_conv.theory.papers.oymak.hypotheses import (
    SOURCE,
    CertifiedHypotheses,
    Hypotheses,
    SampledHypotheses,
    certify_hypotheses,
    judge_hypotheses,
    sampled_hypotheses,
)
from lightning_conv.theory.papers.oymak.line import STEP, judge_line, judge_step, misfits

__all__ = [
    "SOURCE",
    "STEP",
    "CertifiedHypotheses",
    "Hypotheses",
    "SampledHypotheses",
    "certify_hypotheses",
    "judge_hypotheses",
    "judge_line",
    "judge_step",
    "misfits",
    "sampled_hypotheses",
]
