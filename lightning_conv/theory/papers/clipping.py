r"""Regularised gradient clipping, delta-GClip (Tucat, Mukherjee, Sen, Sun & Rivasplata 2025): step and guarantee.

delta-GClip is gradient clipping by norm with a floor delta on the clipping factor. With f the loss, eta the learning
rate and gamma the threshold of the gradient norm,

.. math:: w_{t+1} = w_t - h(w_t) \nabla f(w_t), \qquad
          h(w) = \eta \min\{1, \max\{\delta, \gamma / |\nabla f(w)|\}\}

delta = 0 is clipping by norm, and delta = 1 is gradient descent. The floor eta delta keeps the step from vanishing
where the gradient is large; without it there is no rate of convergence.

The guarantee is about a function f >= 0 that is beta-smooth and satisfies |grad f|^2 >= mu f (the PL* condition) on the
path, and about a learning rate eta <= 1 / beta:

.. math:: f_{t+1} \le f_t - \tfrac{h_t}{2} |\nabla f_t|^2, \quad
          f_t \le (1 - \eta \delta \mu / 2)^t f_0, \quad
          \sum_t h_t |\nabla f_t| \le 4 \sqrt{f_0 / \mu}.

The scale of the loss is arbitrary, as long as f, its gradient, mu and beta have the same one. For f = k S with S = 1/2
sum |u - y|^2 and the kernel G, mu is the minimum of 2 k lambda_min(G) over the path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.checked import checked
from lightning_conv.linalg.eigenvalues.bounded import divide
from lightning_conv.theory.criterion import Criterion, at_least, at_most

Regime: TypeAlias = Literal["full", "clipped", "floor"]

SOURCE = "Tucat et al. 2025 (2404.08624)"


def clipping_factor(norm: float, *, gamma: float, delta: float) -> float:
    r"""Compute h / eta = min(1, max(delta, gamma / |grad f|)), a number in [delta, 1].

    It is 1 for a zero gradient and NaN if the norm is NaN.

    Args:
        norm: |grad f|_2 over all parameters.
        gamma: Threshold of the norm, in the units of the gradient; positive.
        delta: Floor of the factor, in [0, 1]; 0 is clipping by norm without a floor.

    Raises:
        ValueError: gamma or delta is out of range.

    Example:
        >>> [clipping_factor(norm, gamma=1.0, delta=0.25) for norm in (0.5, 2.0, 100.0)]
        [1.0, 0.5, 0.25]
    """
    require_clipping(gamma, delta)
    if math.isnan(norm):
        return math.nan
    return 1.0 if norm <= gamma else max(delta, gamma / norm)


def clipping_regime(norm: float, *, gamma: float, delta: float) -> Regime:
    """Return the step size that is used at this norm: the full one, the clipped one, or the floor eta delta.

    A norm that is NaN counts as ``"full"``, because there is nothing to scale.

    Args:
        norm: |grad f|_2 over all parameters.
        gamma: Threshold of the norm, in the units of the gradient; positive.
        delta: Floor of the factor, in [0, 1]; 0 is clipping by norm without a floor.

    Returns:
        ``"full"`` (step eta), ``"clipped"`` (eta gamma / norm) or ``"floor"`` (eta delta).

    Raises:
        ValueError: gamma or delta is out of range.

    Example:
        >>> [clipping_regime(norm, gamma=1.0, delta=0.25) for norm in (0.5, 2.0, 100.0)]
        ['full', 'clipped', 'floor']
    """
    factor = clipping_factor(norm, gamma=gamma, delta=delta)
    if factor == 1.0 or math.isnan(factor):
        return "full"
    return "floor" if factor == delta else "clipped"


@checked()
def require_clipping(gamma: float, delta: float) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: gamma is not positive, or delta is not in [0, 1].
    """
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma: {gamma}; need a positive threshold of the gradient's norm")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta: {delta}; need a floor in [0, 1] (0: clipping by norm, 1: gradient descent)")


def clipped_loss_bound(loss: float, *, eta: float, delta: float, mu: float, steps: int) -> float:
    """Compute (1 - eta delta mu / 2)^t f_0, the bound of f_t under the theorem's hypotheses.

    Args:
        loss: Initial loss f_0.
        eta: Learning rate, at most 1 / beta. PL* and smoothness give mu <= 2 beta, hence eta mu / 2 <= 1.
        delta: Floor of the clipping factor, in [0, 1].
        mu: Constant of PL*, |grad f|^2 >= mu f.
        steps: Number t of steps.

    Raises:
        ValueError: eta delta mu / 2 is above 1 or negative, which the hypotheses exclude.
    """
    shrink = eta * delta * mu / 2
    if not 0 <= shrink <= 1:
        raise ValueError(
            f"eta, delta, mu: eta delta mu / 2 = {shrink:.4g}; the hypotheses (eta <= 1 / beta, mu <= 2 beta) give at most 1"
        )
    return loss * (1 - shrink) ** steps


def clipped_path_bound(loss: float, mu: float) -> float:
    r"""Compute 4 sqrt(f_0 / mu), which bounds the length of the path for all step sizes h_t.

    It follows from f_t - f_{t+1} >= (h_t / 2) |grad f_t|^2 and |grad f_t| >= sqrt(mu f_t):

    h_t |grad f_t| <= (2 / sqrt(mu)) (f_t - f_{t+1}) / sqrt(f_t) <= (4 / sqrt(mu)) (sqrt(f_t) - sqrt(f_{t+1})).

    Args:
        loss: Initial loss f_0.
        mu: Constant of PL*, |grad f|^2 >= mu f; the bound is infinite where it is not positive.
    """
    return 4 * math.sqrt(loss / mu) if mu > 0 else math.inf


@dataclass(frozen=True)
class ClippedPath:
    """A run of delta-GClip: T steps from f_0 to f_T.

    Raises:
        ValueError: gamma or delta is out of range, or there is not one loss more than steps.
    """

    eta: float
    gamma: float
    delta: float
    losses: Sequence[float]  # f_0 ... f_T
    norms: Sequence[float]  # |grad f_0| ... |grad f_{T-1}|

    def __post_init__(self) -> None:
        require_clipping(self.gamma, self.delta)
        if len(self.losses) != len(self.norms) + 1 or not self.norms:
            raise ValueError(
                f"losses, norms: {len(self.losses)} and {len(self.norms)}; need at least one step, and one loss more than steps"
            )

    @property
    def steps(self) -> list[float]:
        """h_t = eta times the factor."""
        return [self.eta * clipping_factor(norm, gamma=self.gamma, delta=self.delta) for norm in self.norms]

    @property
    def regimes(self) -> list[Regime]:
        """Step size that was used at each step: ``"full"``, ``"clipped"`` or ``"floor"``."""
        return [clipping_regime(norm, gamma=self.gamma, delta=self.delta) for norm in self.norms]

    @property
    def length(self) -> float:
        """sum_t h_t |grad f_t|."""
        return math.fsum(step * norm for step, norm in zip(self.steps, self.norms, strict=True))


def clipping_criteria(path: ClippedPath, mu: float, *, rounding: float = 1e-12) -> list[Criterion]:
    """Judge the inequalities of the theorem along a run: descent, PL*, rate and length.

    Each of them is about the iterates of this run. The first two imply the other two; if the first two are true and a
    later one is false, the measurement is wrong.

    Args:
        path: A run of delta-GClip.
        mu: A lower bound of |grad f|^2 / f on the path.
        rounding: Rounding error of the losses, relative to the largest of them; losses at or below it are not judged.

    Returns:
        The criteria ``clipping_descent``, ``clipping_pl``, ``clipping_rate`` and ``clipping_length``, in this order.

    Raises:
        ValueError: mu is not positive, or eta delta mu / 2 is above 1, which the hypotheses exclude.
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
    over = [
        divide(loss, clipped_loss_bound(losses[0], eta=path.eta, delta=path.delta, mu=mu, steps=t))
        for t, loss in enumerate(losses[1:], 1)
        if loss > floor
    ]
    descent, rate = "(f_t - f_{t+1}) / (h_t |grad f_t|^2) >= 1/2", "f_t / ((1 - eta delta mu / 2)^t f_0) <= 1"
    least, most = min(efficiency, default=math.nan), clipped_path_bound(losses[0], mu)
    return [
        at_least("clipping_descent", SOURCE, f"{descent} at every step", least, 0.5),
        at_least("clipping_pl", SOURCE, "|grad f_t|^2 / f_t >= mu at every step", min(ratios, default=math.nan), mu),
        at_most("clipping_rate", SOURCE, f"{rate} at every step", max(over, default=math.nan), 1.0),
        at_most("clipping_length", SOURCE, "sum_t h_t |grad f_t| <= 4 sqrt(f_0 / mu)", path.length, most),
    ]
