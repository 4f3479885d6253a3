"""Kawaguchi and Sun's expressivity condition (2104.05785) as numbers and criteria; ``phase_two`` has the rates.

For last hidden features h (n x m_H) the condition is phi(w) = det([h, 1] [h, 1]^T) != 0, that is rank [h, 1] = n. The
number phi itself under- or overflows, so its logarithm, the singular values and a certificate of the rank are used
instead. The certificates come from ``lightning_conv.expressivity``; this module says what they mean for the theorem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.expressivity import RankCertificate, certify_expressivity
from lightning_conv.expressivity.certify import FEW
from lightning_conv.expressivity.decomposition import decompose
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.estimates import spectral_entropy
from lightning_conv.linalg.rounding import ldexp
from lightning_conv.theory.criterion import Criterion

SOURCE = "Kawaguchi, Sun 2104.05785"
ALIGNMENT = "Kawaguchi, Zhang, Deng 2106.14836"
EPSILON = 2.0**-52


@dataclass(frozen=True)
class ExpressivityFacts:
    """Facts that follow from the singular values of [h, 1]; float64."""

    certificate: RankCertificate  # of rank n, with sigma_min and sigma_max
    singular_values: Tensor  # min(n, m_H + 1), descending
    log_phi: Bounded  # log det([h, 1] [h, 1]^T) = 2 sum log sigma_i; -inf where the rank is below n
    alignment: RankCertificate | None  # of the targets, where they were given

    @property
    def sigma_max(self) -> float:
        """sigma_1; the certificate contains its bounds."""
        return float(self.singular_values[0])

    @property
    def sigma_min(self) -> float:
        """The n-th singular value, 0 if there are fewer columns than samples; the certificate contains its bounds."""
        full = len(self.singular_values) == self.certificate.n
        return float(self.singular_values[-1]) if full else 0.0

    @property
    def condition_number(self) -> float:
        """sigma_1 / sigma_n; infinite below rank n. Gradient descent on the head takes about its square in steps."""
        return self.sigma_max / self.sigma_min if self.sigma_min > 0 else math.inf

    @property
    def stable_rank(self) -> float:
        """|[h, 1]|_F^2 / sigma_1^2, between 1 and the rank; 0 for a matrix of zeros."""
        largest = self.singular_values[0]
        return float((self.singular_values / largest).square().sum()) if float(largest) > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of sigma_i / sum sigma (Roy & Vetterli 2007), between 1 and the rank; 0 for zeros."""
        return float(spectral_entropy(self.singular_values).exp())


def expressivity_facts(
    features: Tensor,
    targets: Tensor | None = None,
    *,
    bias: bool = True,
    feature_error: float = 0.0,
    narrow: str | None = None,
) -> ExpressivityFacts:
    """Compute the certificate, log phi, the ranks and the alignment of the features of n samples.

    For up to 512 samples all singular values have proven error radii, so the interval of log phi is proven if
    ``feature_error`` is 0. For more samples it is an estimate.

    Args:
        features: h, (n, m_H), float64.
        targets: Y, (n, C), or class numbers, for the alignment residual |(I - P) Y| / |Y|, where P projects on the
            range of [h, 1].
        bias: Whether the last layer has a trained bias.
        feature_error: See ``certify_expressivity``.
        narrow: See ``certify_expressivity``.

    Raises:
        ValueError: See ``certify_expressivity``.

    Cost: two or three singular value decompositions of n x (m_H + 1).

    Example:
        >>> facts = expressivity_facts(torch.eye(3, dtype=torch.float64), bias=False)
        >>> facts.certificate.verdict, facts.condition_number, facts.stable_rank
        ('certified', 1.0, 3.0)
    """
    certificate = certify_expressivity(
        features, method="singular", bias=bias, feature_error=feature_error, narrow=narrow
    )
    columns = torch.cat([features, features.new_ones(len(features), 1)], 1) if bias else features
    radii = None
    if len(columns) <= FEW:
        decomposition = decompose(columns)
        values, radii = (ldexp(each, decomposition.exponent) for each in (decomposition.values, decomposition.radii))
        if decomposition.exponent:  # both may have become subnormal
            radii = radii + 2 * math.ulp(0.0)
    else:
        values = torch.linalg.svdvals(columns)
    aligned = None
    if targets is not None:
        aligned = certify_expressivity(
            features, method="alignment", targets=targets, bias=bias, feature_error=feature_error, narrow=narrow
        )
    return ExpressivityFacts(certificate, values, _log_phi(values, radii, certificate), aligned)


def _log_phi(values: Tensor, radii: Tensor | None, certificate: RankCertificate) -> Bounded:
    method = "twice the sum of log sigma_i, each within its error"
    if len(values) < certificate.n:
        return Bounded(-math.inf, -math.inf, -math.inf, True, "fewer columns than samples")
    proven = radii is not None and certificate.feature_error == 0 and not certificate.narrow
    if radii is None:  # the rounding error of the decomposition has no proven bound here and is estimated
        radii = torch.full_like(values, certificate.n * EPSILON * float(values[0]))
    radii = radii + certificate.feature_error
    value, lower, upper = (2 * float((values + sign * radii).clamp(min=0).log().sum()) for sign in (0, -1, 1))
    slack = 1e-13 * max(abs(value), float(len(values)))
    return Bounded(value, lower - slack, upper + slack, proven, method)


def judge_expressivity(facts: ExpressivityFacts) -> list[Criterion]:
    """Judge the condition, and its weaker form for the given targets.

    Args:
        facts: Facts about the features, by ``expressivity_facts``.

    Returns:
        - ``expressivity_condition``: rank [h, 1] = n, with the verdict of the certificate; ``measured`` is sigma_min.
        - ``alignment``, if targets were given: |(I - P) Y| <= 1e-8 |Y|, which is necessary and sufficient for these
          targets, even if the rank is below n.
    """
    certificate, asks = facts.certificate, "rank [h, 1] = n, that is sigma_min([h, 1]) > 0"
    found = [_from_certificate("expressivity_condition", SOURCE, asks, certificate, certificate.sigma_min)]
    if facts.alignment is not None:
        asks = "the targets lie in the range of [h, 1]: |(I - P) Y| / |Y| = 0, here at most 1e-8"
        found.append(_from_certificate("alignment", ALIGNMENT, asks, facts.alignment, facts.alignment.residual))
    return found


def _from_certificate(
    name: str, source: str, asks: str, certificate: RankCertificate, measured: Bounded | None
) -> Criterion:
    value = measured.value if measured is not None else math.nan
    # A certificate that rests on an estimate of the rounding error inside the trunk is no proof.
    estimated = certificate.verdict == "certified" and certificate.feature_error > 0
    verdict = "consistent" if estimated else certificate.verdict
    return Criterion(name, source, asks, value, 0.0, verdict, certificate.reason)
