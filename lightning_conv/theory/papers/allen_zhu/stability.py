"""Forward stability (Allen-Zhu, Li & Song 2019, section 4 and 5): norms of hidden states, their drift, units that switch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.theory.criterion import Criterion, at_least, at_most, not_applicable
from lightning_conv.theory.tools.power_law import power_law

NORMS = "Allen-Zhu, Li, Song 2019, Lemma 4.1"
DRIFT = "Allen-Zhu, Li, Song 2019, Lemma 5.2"
SIGN_ASKS = "share of switched units <= C omega^(2/3) L, so exponent >= 2/3"
SIGN_EXPONENT = 2 / 3
"""Lemma 5.2: at most O(m omega^{2/3} L) units switch for |W_l - W_l(0)|_2 <= omega."""


@dataclass(frozen=True)
class HiddenNorms:
    """|h_{i,l}| over all samples i and layers l = 0..L."""

    smallest: float
    largest: float

    def criteria(self, *, papers_network: bool = True) -> list[Criterion]:
        """3/4 <= |h_{i,l}| <= 5/4 at the initialisation, judged for these weights and samples.

        Args:
            papers_network: the network is ``AllenZhuNet`` on ``unit_inputs``; for another one the numbers are told and not judged.
        """
        asks = ("|h_{i,l}| >= 3/4 at the start", "|h_{i,l}| <= 5/4 at the start")
        names = ("hidden_norm_min", "hidden_norm_max")
        if not papers_network:
            reason = "another network or normalisation than the paper's"
            pairs = zip(names, asks, (self.smallest, self.largest), strict=True)
            return [not_applicable(name, NORMS, ask, reason, value) for name, ask, value in pairs]
        return [
            at_least(names[0], NORMS, asks[0], self.smallest, 0.75),
            at_most(names[1], NORMS, asks[1], self.largest, 1.25),
        ]


def hidden_norms(states: Sequence[Tensor]) -> HiddenNorms:
    """The smallest and largest |h_{i,l}| of hidden states, each (n, units)."""
    norms = torch.stack([torch.linalg.vector_norm(h.double(), dim=1) for h in states])
    return HiddenNorms(float(norms.min()), float(norms.max()))


def drift_constant(drift: float, omega: float, *, depth: int, width: int) -> float:
    """Drift over omega L^{5/2} sqrt(ln m): what stands for O(1) in Lemma 5.2. NaN while nothing has moved."""
    if omega == 0:
        return math.nan
    return drift / (omega * math.sqrt(depth**5 * math.log(max(width, 2))))


def sign_change_exponent(
    omega: Sequence[float], fraction: Sequence[float], *, tolerance: float = 0.05, errors: float = 0.0
) -> Criterion:
    r"""The exponent p in (share of switched units) ~ omega^p against the 2/3 of Lemma 5.2.

    The lemma bounds the share from above by O(omega^{2/3} L) for every W' with |W'|_2 <= omega, so that as omega falls the share may
    fall faster: it asks p >= 2/3. The exponent 2/3 itself is that of the worst direction (``worst_step``); a step that spreads
    evenly over the units switches about omega of them, p = 1.

    Args:
        omega: max_l |W_l - W_l(0)|_2, at several moments or widths.
        fraction: share of units that switched.
        tolerance: that the fit may lie below 2/3.
        errors: standard errors of the fit that the exponent gets to either side. They are those of points that scatter independently about
            the line; the moments of one run do not.

    Raises:
        ValueError: fewer than two different omega with switched units.
    """
    law = power_law(omega, fraction)
    # Two points have no error that could be told.
    width = errors * (math.inf if math.isnan(law.error) else law.error) if errors else 0.0
    exponent = Bounded(
        law.exponent, law.exponent - width, law.exponent + width, certified=False, method="least squares of logarithms"
    )
    asks = f"{SIGN_ASKS}, less {tolerance:g} for the fit"
    return at_least("sign_change_exponent", DRIFT, asks, exponent, SIGN_EXPONENT - tolerance)


def worst_step(weight: Tensor, state: Tensor, switched: int) -> Tensor:
    r"""The step V of W with the smallest |V|_2 that takes ``switched`` units of one sample to zero.

    For h = h_{l-1} and g = W h, V = -g_K h^T / |h|^2 with g_K the entries of g that are closest to zero: after W + V they are zero, and
    any smaller multiple leaves their signs, any larger one turns them. |V|_2 = |V h| / |h| is the least that does it.
    With g_k spread like N(0, 2 |h|^2 / m) the K smallest have |g_K|^2 of about (pi/3) |h|^2 (K/m)^3 (once K is small against m), so
    K = m omega^{2/3} (3/pi)^{1/3}: the exponent of Lemma 5.2 is attained.

    Args:
        weight: W, (m, k).
        state: h, (k,).
        switched: K.

    Raises:
        ValueError: K is not between 1 and m, or h is zero.
    """
    if not 1 <= switched <= len(weight):
        raise ValueError(f"switched: {switched}; need 1 to {len(weight)} units")
    square = float(state.double().square().sum())
    if square == 0:
        raise ValueError("state: is zero, so no step of the weight reaches the units")
    g = weight @ state
    chosen = g.abs().argsort()[:switched]
    step = torch.zeros_like(weight)
    step[chosen] = -g[chosen, None] * state / square
    return step


def worst_size(preactivations: Tensor, state_norm: float, switched: int) -> float:
    """|V|_2 of ``worst_step``, without forming it: |g_K| / |h|.

    Args:
        preactivations: g = W h, (m,).
        state_norm: |h|.
        switched: K.
    """
    closest = preactivations.double().abs().sort().values[:switched]
    return float(closest.norm()) / state_norm
