"""Forward stability (Allen-Zhu, Li & Song 2019, sections 4 and 5): hidden states and their drift, units that switch."""

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
        """Judge 3/4 <= |h_{i,l}| <= 5/4 at the initialisation, for these weights and samples.

        Args:
            papers_network: Whether the network is ``AllenZhuNet`` on ``unit_inputs``. For another network the numbers
                are reported and not judged.

        Returns:
            The criteria ``hidden_norm_min`` and ``hidden_norm_max``, in this order.
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
    """Compute the smallest and the largest |h_{i,l}| of hidden states, each (n, units)."""
    norms = torch.stack([torch.linalg.vector_norm(h.double(), dim=1) for h in states])
    return HiddenNorms(float(norms.min()), float(norms.max()))


def drift_constant(drift: float, omega: float, *, depth: int, width: int) -> float:
    """Compute drift / (omega L^{5/2} sqrt(ln m)), the constant O(1) of Lemma 5.2. NaN while nothing has moved."""
    if omega == 0:
        return math.nan
    return drift / (omega * math.sqrt(depth**5 * math.log(max(width, 2))))


def sign_change_exponent(
    omega: Sequence[float], fraction: Sequence[float], *, tolerance: float = 0.05, errors: float = 0.0
) -> Criterion:
    r"""Judge the exponent p of (share of switched units) ~ omega^p against the 2/3 of Lemma 5.2.

    The lemma bounds the share from above by O(omega^{2/3} L) for every perturbation W' with |W'|_2 <= omega. As omega
    falls, the share may fall faster, so the lemma requires p >= 2/3. The exponent 2/3 is that of the worst direction
    (``worst_step``). A step that is spread evenly over the units switches a share of about omega, p = 1.

    Args:
        omega: max_l |W_l - W_l(0)|_2, at several times or widths.
        fraction: Share of the units that have switched.
        tolerance: Amount by which the fit may lie below 2/3.
        errors: Half-width of the interval of the exponent, in standard errors of the fit. The standard error assumes
            points that scatter independently about the line, which the points of one run do not.

    Raises:
        ValueError: There are fewer than two different omega with switched units.
    """
    law = power_law(omega, fraction)
    # Two points determine the line and leave no error to estimate.
    width = errors * (math.inf if math.isnan(law.error) else law.error) if errors else 0.0
    exponent = Bounded(
        law.exponent, law.exponent - width, law.exponent + width, certified=False, method="least squares of logarithms"
    )
    asks = f"{SIGN_ASKS}, less {tolerance:g} for the fit"
    return at_least("sign_change_exponent", DRIFT, asks, exponent, SIGN_EXPONENT - tolerance)


def worst_step(weight: Tensor, state: Tensor, switched: int) -> Tensor:
    r"""Find the step V of W with the smallest |V|_2 that takes ``switched`` units of one sample to zero.

    For h = h_{l-1} and g = W h it is V = -g_K h^T / |h|^2, where g_K are the K entries of g closest to zero. They
    vanish for W + V; any smaller multiple of V leaves their signs and any larger one flips them. No step with a smaller
    norm than |V|_2 = |g_K| / |h| does this. For entries distributed as N(0, 2 |h|^2 / m), the K smallest have |g_K|^2
    of about (pi/3) |h|^2 (K/m)^3 for K << m, so K = m omega^{2/3} (3/pi)^{1/3} with omega = |V|_2: the exponent of
    Lemma 5.2 is attained.

    Args:
        weight: Weights W of the layer, (m, k).
        state: Input h of the layer for one sample, (k,).
        switched: Number K of units.

    Returns:
        V, of the shape of ``weight``.

    Raises:
        ValueError: K is not between 1 and m, or h is zero.
    """
    if not 1 <= switched <= len(weight):
        raise ValueError(f"switched: {switched}; need 1 to {len(weight)} units")
    square = float(state.double().square().sum())
    if square == 0:
        raise ValueError("state: all entries are zero, so that no step of the weight changes the units")
    g = weight @ state
    chosen = g.abs().argsort()[:switched]
    step = torch.zeros_like(weight)
    step[chosen] = -g[chosen, None] * state / square
    return step


def worst_size(preactivations: Tensor, state_norm: float, switched: int) -> float:
    """Compute |V|_2 = |g_K| / |h| of ``worst_step`` without forming the step.

    Args:
        preactivations: Pre-activations g = W h of one sample, (m,).
        state_norm: Norm |h| of the layer's input.
        switched: Number K of units.
    """
    closest = preactivations.double().abs().sort().values[:switched]
    return float(closest.norm()) / state_norm
