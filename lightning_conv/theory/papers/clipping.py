r"""Regularised gradient clipping, delta-GClip (Tucat, Mukherjee, Sen, Sun & Rivasplata 2025): its step, and what it guarantees.

.. math:: w_{t+1} = w_t - h(w_t) \nabla f(w_t), \qquad
          h(w) = \eta \min\{1, \max\{\delta, \gamma / |\nabla f(w)|\}\}

delta = 0 is clipping by norm; delta = 1 is gradient descent. The floor eta delta keeps the step from vanishing where the gradient is
large, which is what a rate of convergence needs.

The guarantee, for f >= 0 that is beta-smooth and has |grad f|^2 >= mu f (PL*) on the path, with eta <= 1 / beta:

.. math:: f_{t+1} \le f_t - \tfrac{h_t}{2} |\nabla f_t|^2, \quad
          f_t \le (1 - \eta \delta \mu / 2)^t f_0, \quad
          \sum_t h_t |\nabla f_t| \le 4 \sqrt{f_0 / \mu}.

Any scale of the loss will do, as long as f, its gradient, mu and beta are of the same one. For f = k S with S = 1/2 sum |u - y|^2 and
the kernel G: mu = 2 k lambda_min(G) over the path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.theory.criterion import Criterion, at_least, at_most

Regime: TypeAlias = Literal["full", "clipped", "floor"]

SOURCE = "Tucat et al. 2025 (2404.08624)"


def clipping_factor(norm: float, *, gamma: float, delta: float) -> float:
    r"""h / eta = min(1, max(delta, gamma / |grad f|)), in [delta, 1]; 1 for a gradient of zero, NaN for one that is not a number.

    Args:
        norm: |grad f|_2 over all parameters.
        gamma: threshold of the norm, in the units of the gradient; above 0.
        delta: floor of the factor, in [0, 1]; 0 is clipping by norm without a floor.

    Raises:
        ValueError: gamma or delta out of range.

    Example:
        >>> [clipping_factor(norm, gamma=1.0, delta=0.25) for norm in (0.5, 2.0, 100.0)]
        [1.0, 0.5, 0.25]
    """
    require_clipping(gamma, delta)
    if math.isnan(norm):
        return math.nan
    return 1.0 if norm <= gamma else max(delta, gamma / norm)


def clipping_regime(norm: float, *, gamma: float, delta: float) -> Regime:
    """Which of the three decides at a gradient of this norm: the full step, the clipped one, or the floor eta delta.

    A norm that is no number counts as ``"full"``: there is nothing to scale.

    Example:
        >>> [clipping_regime(norm, gamma=1.0, delta=0.25) for norm in (0.5, 2.0, 100.0)]
        ['full', 'clipped', 'floor']
    """
    factor = clipping_factor(norm, gamma=gamma, delta=delta)
    if factor == 1.0 or math.isnan(factor):
        return "full"
    return "floor" if factor == delta else "clipped"


def require_clipping(gamma: float, delta: float) -> None:
    """Refuse settings that are none.

    Raises:
        ValueError: gamma is not positive, or delta is not in [0, 1].
    """
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma: {gamma}; need a positive threshold of the gradient's norm")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta: {delta}; need a floor in [0, 1] (0: clipping by norm, 1: gradient descent)")


def clipped_loss_bound(loss: float, *, eta: float, delta: float, mu: float, steps: int) -> float:
    """(1 - eta delta mu / 2)^t f_0, which f_t obeys under the theorem's hypotheses.

    Args:
        loss: f_0.
        eta: the learning rate, at most 1 / beta. PL* and smoothness give mu <= 2 beta, hence eta mu / 2 <= 1.
        delta: the floor.
        mu: of PL*, |grad f|^2 >= mu f.
        steps: t.

    Raises:
        ValueError: eta delta mu / 2 is above 1 or negative, which the hypotheses rule out.
    """
    shrink = eta * delta * mu / 2
    if not 0 <= shrink <= 1:
        raise ValueError(
            f"eta, delta, mu: eta delta mu / 2 = {shrink:.4g}; the hypotheses (eta <= 1 / beta, mu <= 2 beta) give at most 1"
        )
    return loss * (1 - shrink) ** steps


def clipped_path_bound(loss: float, mu: float) -> float:
    r"""4 sqrt(f_0 / mu), a bound on the length of the path, whatever the step sizes h_t.

    From f_t - f_{t+1} >= (h_t / 2) |grad f_t|^2 and |grad f_t| >= sqrt(mu f_t):

    h_t |grad f_t| <= (2 / sqrt(mu)) (f_t - f_{t+1}) / sqrt(f_t) <= (4 / sqrt(mu)) (sqrt(f_t) - sqrt(f_{t+1})).
    """
    return 4 * math.sqrt(loss / mu) if mu > 0 else math.inf


@dataclass(frozen=True)
class ClippedPath:
    """A run of delta-GClip: T steps from f_0 to f_T."""

    eta: float
    gamma: float
    delta: float
    losses: Sequence[float]  # f_0 ... f_T
    norms: Sequence[float]  # |grad f_0| ... |grad f_{T-1}|

    def __post_init__(self) -> None:
        require_clipping(self.gamma, self.delta)
        if len(self.losses) != len(self.norms) + 1 or not self.norms:
            raise ValueError(
                f"losses, norms: {len(self.losses)} and {len(self.norms)}; need one loss more than steps, and a step or more"
            )

    @property
    def steps(self) -> list[float]:
        """h_t = eta times the factor."""
        return [self.eta * clipping_factor(norm, gamma=self.gamma, delta=self.delta) for norm in self.norms]

    @property
    def regimes(self) -> list[Regime]:
        """Which of the three decided, step by step."""
        return [clipping_regime(norm, gamma=self.gamma, delta=self.delta) for norm in self.norms]

    @property
    def length(self) -> float:
        """sum_t h_t |grad f_t|."""
        return math.fsum(step * norm for step, norm in zip(self.steps, self.norms, strict=True))


def clipping_criteria(path: ClippedPath, mu: float, *, rounding: float = 1e-12) -> list[Criterion]:
    """The inequalities of the theorem along a run: descent, PL*, rate and length.

    Each is about the iterates of this run. The first two imply the other two; where those two hold and a later one does not, the
    measurement is wrong.

    Args:
        path: the run.
        mu: a lower bound of |grad f|^2 / f on the path.
        rounding: of the losses, relative to the largest of them; a loss at that level is not judged.

    Raises:
        ValueError: mu is not positive.
    """
    if not mu > 0:
        raise ValueError(f"mu: {mu}; PL* needs a positive constant")
    losses, norms, steps = path.losses, path.norms, path.steps
    floor = rounding * max(losses)
    efficiency = [
        (losses[t] - losses[t + 1]) / (steps[t] * norms[t] ** 2)
        for t in range(len(norms))
        if norms[t] > 0 and losses[t] > floor
    ]
    ratios = [norm**2 / loss for norm, loss in zip(norms, losses, strict=False) if loss > floor]
    over = max(
        (
            loss / clipped_loss_bound(losses[0], eta=path.eta, delta=path.delta, mu=mu, steps=t)
            for t, loss in enumerate(losses[1:], 1)
            if loss > floor
        ),
        default=0.0,
    )
    return [
        at_least(
            "clipping_descent", SOURCE, "(f_t - f_{t+1}) / (h_t |grad f_t|^2) >= 1/2 at every step",
            min(efficiency, default=math.nan), 0.5,
        ),
        at_least("clipping_pl", SOURCE, "|grad f_t|^2 / f_t >= mu at every step", min(ratios, default=math.nan), mu),
        at_most(
            "clipping_rate", SOURCE, "f_t / ((1 - eta delta mu / 2)^t f_0) <= 1 at every step", over, 1.0
        ),
        at_most(
            "clipping_length", SOURCE, "sum_t h_t |grad f_t| <= 4 sqrt(f_0 / mu)", path.length,
            clipped_path_bound(losses[0], mu),
        ),
    ]  # fmt: skip
