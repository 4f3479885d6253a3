"""The guard's verdict on the claim that the infimum over the last layer is the infimum of the loss over all outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import HeadProblem, HeadSolution
from lightning_conv.losses.kind import LossKind, loss_kind
from lightning_conv.theory.criterion import Verdict

Attained: TypeAlias = Literal["distance", "hard labels", "other"]
"""Where a loss comes to its infimum, as a function of its outputs u for given targets y.

``"distance"``: at u = y and nowhere else (squared, absolute, Huber); ``"hard labels"``: a cross-entropy that comes to it where the right
class scores highest for every sample; ``"other"``: elsewhere, or not known.
"""


def where_attained(loss: LossKind, targets: Tensor) -> Attained:
    """Return where a loss comes to its infimum.

    Args:
        loss: Loss of the training step.
        targets: Targets y of all samples.
    """
    return "distance" if loss.distance else "hard labels" if loss.hard_labels(targets) else "other"


SEPARATED = (
    "some head on this trunk separates the classes, so the infimum of the last layer is that over all outputs, 0"
)


HARD = 1e-8  # relative residual of one-hot targets, far below half of the distance between two classes for any number of samples
AHEAD = 0.88  # -ln(sqrt(2) - 1), rounded down: the lead of the right output where its loss is below ln 2 / 2


@dataclass(frozen=True)
class HeadBounds:
    """What the solution of the head's problem proves of inf_W L, the infimum over all heads on this trunk."""

    lower: float  # bound over *all* heads; minus infinity: none is known
    upper: float
    infimum: float | None  # (1/n) sum_i inf ell_i, at most; None: not known
    separated: bool  # whether some head gives the right class of every sample more than half of the probability

    @classmethod
    def of(cls, problem: HeadProblem, solution: HeadSolution, kind: Attained, feature_error: float = 0.0) -> HeadBounds:
        r"""Return the bounds that a solution proves.

        With hard labels and equal weights :math:`n L < \ln 2` leaves every sample's loss below ln 2, so its class has more than half
        of the probability and the largest output; :math:`cW, c \to \infty`, then brings the loss to 0. To allow for rounding inside the
        trunk, half of ln 2 is asked for, which leaves each such output ahead by more than 0.88, and :math:`2 |W|_F \|\delta h\|_F < 0.88`,
        by which it may move.

        Args:
            problem: Problem of the head.
            solution: Solution of the problem.
            kind: Where the loss comes to its infimum.
            feature_error: Estimate of what rounding inside the trunk does to the features, in the Frobenius norm.
        """
        dual = solution.head_infimum
        lower = dual.lower if dual is not None and math.isinf(dual.radius) else -math.inf
        weighted = loss_kind(problem.losses.module).weighted
        # A fixed bias would not be scaled.
        plain = kind == "hard labels" and not weighted and problem.losses.mean and problem.offset is None
        ahead = 2 * float(solution.weight.norm()) * feature_error < AHEAD
        separated = plain and ahead and problem.samples * solution.loss.upper < math.log(2) / 2
        infimum = solution.infimum
        return cls(lower, solution.loss.upper, None if infimum is None else infimum.upper, separated)


def verdict_on(
    certificate: RankCertificate | None, kind: Attained, bounds: HeadBounds | None, caveats: Sequence[str]
) -> tuple[Verdict, str]:
    r"""Judge the claim :math:`\inf_W L = \frac1n \sum_i \inf_q \ell(q, y_i)`, below which no weights of any network can go.

    Rank n proves the claim for every loss, but is not necessary: a lower rank refutes nothing, whether the head is narrow or samples are
    equal (two equal samples with equal labels leave the infimum where it is). The distance rho of the targets from the range of the
    features decides as follows:

    - a loss whose infimum is attained at the targets only: rho = 0 proves the claim, and rho > 0 refutes it (the infimum over the closed
      range of [h, 1] is then attained elsewhere)
    - cross-entropy with hard labels: rho = 0 proves the claim (c Y, c to infinity); rho > 0 says nothing, since separable features
      have rho > 0, too
    - any other loss: neither; for soft labels q, for example, log q would have to be in the range

    Where the certificate does not decide, the solved problem of the head may.

    Args:
        certificate: Certificate of the switch; None: there is none.
        kind: Where the loss comes to its infimum.
        bounds: Bounds of the head's problem, where it was solved.
        caveats: What the run does beside minimising the mean loss of the samples; if there are any, nothing is claimed.

    Returns:
        The verdict, and why it is not ``"certified"``, unless the certificate or a caveat says so itself.
    """
    verdict, why = _by_certificate(certificate, kind)
    if verdict == "undecided" and bounds is not None:
        verdict, why = _by_bounds(bounds) or (verdict, why)
    return ("undecided", "") if caveats and verdict != "undecided" else (verdict, why)


def _by_certificate(certificate: RankCertificate | None, kind: Attained) -> tuple[Verdict, str]:
    if certificate is None:
        return "undecided", ""
    if certificate.method != "alignment":
        if certificate.verdict == "refuted":
            return (
                "undecided",
                "a rank below n does not refute that the last layer's infimum is the global one: that depends on the targets",
            )
        return certificate.verdict, ""
    if certificate.rank_lower == certificate.n:  # every matrix of outputs is reached, the targets or not
        return "certified", ""
    if kind == "hard labels" and certificate.residual is not None and certificate.residual.upper <= HARD:
        return "certified", ""  # no output is off by half of the distance between two classes
    if certificate.verdict == "undecided" or (kind == "distance" and certificate.verdict == "certified"):
        return certificate.verdict, ""
    if kind == "distance":
        return (
            "refuted",
            "this loss has its infimum at the targets only, and the last layer provably does not reach them",
        )
    if certificate.verdict == "refuted":
        return "undecided", (
            "targets out of the last layer's reach refute nothing for this loss, which may come to its infimum elsewhere (cross-entropy: "
            "wherever the features are separable)"
        )
    if kind == "hard labels":
        return "certified", ""
    return (
        "undecided",
        "that the targets are reached proves nothing for this loss, which is not known to have its infimum there",
    )


def _by_bounds(bounds: HeadBounds) -> tuple[Verdict, str] | None:
    if bounds.separated:
        return "certified", ""
    if bounds.infimum is not None and bounds.lower > bounds.infimum:
        return (
            "refuted",
            f"the loss of every head on this trunk is at least {bounds.lower:.6g}, the infimum at most {bounds.infimum:.6g}",
        )
    return None
