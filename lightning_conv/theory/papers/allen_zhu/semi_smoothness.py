"""Semi-smoothness (Allen-Zhu, Li & Song 2019, Theorem 4): the remainder of F after its linear part, and its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_conv.losses.squared import HalfSumOfSquares, half_sum_of_squares
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.tools.matrix_norms import largest_spectral_norm

SOURCE = "Allen-Zhu, Li, Song 2019, Theorem 4"
ASKS = "F(W + V) <= F(W) + <grad F(W), V> + a sqrt(F(W)) |V|_2 + b |V|_2^2"
ROUNDING = 1e-12
"""A residual below this share of F is rounding error in float64."""

step_size = largest_spectral_norm  # |V|_2 of a step V, its former name

COLLINEAR = 100.0
"""Condition number of the fit above which the steps do not determine a and b separately."""


@dataclass(frozen=True)
class Residual:
    """rho = F(W + V) - F(W) - <grad F(W), V> for one step V."""

    loss: float  # F(W)
    next_loss: float  # F(W + V)
    linear: float  # <grad F(W), V>
    size: float  # |V|_2 = max_l |V_l|_2, spectral

    @property
    def value(self) -> float:
        """rho; negative where F is concave along the step."""
        return self.next_loss - self.loss - self.linear

    @property
    def resolved(self) -> bool:
        """Whether rho exceeds the rounding error of three numbers of the size of F."""
        return abs(self.value) > ROUNDING * max(self.loss, self.next_loss, abs(self.linear))


def residual(
    model: nn.Module, inputs: Inputs, targets: Tensor, step: Mapping[str, Tensor], *, at: HalfSumOfSquares | None = None
) -> Residual:
    """Compute rho of one step of any module in float64; the module is not changed.

    Args:
        model: The network with the weights W.
        inputs: Inputs of the n samples.
        targets: Targets y, in the shape of the outputs.
        step: V by parameter name; parameters that are missing do not move.
        at: ``half_sum_of_squares`` at W with its gradient, if it is already computed.

    Raises:
        ValueError: A name in ``step`` is no parameter of the model.

    Cost: one forward pass, another forward and backward pass without ``at``, and the spectral norms of V.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(step) - set(parameters))
    if unknown:
        raise ValueError(f"step: {unknown} are no parameters of the model (it has {sorted(parameters)})")
    at = at or half_sum_of_squares(model, inputs, targets, dtype=torch.float64)
    moved = {name: parameters[name].detach().double() + part.double() for name, part in step.items()}
    after = half_sum_of_squares(model, inputs, targets, gradient=False, parameters=moved, dtype=torch.float64)
    return Residual(at.loss, after.loss, at.along(step), largest_spectral_norm(step))


@dataclass(frozen=True)
class SemiSmoothness:
    r"""rho <= a sqrt(F) |V|_2 + b |V|_2^2 with a, b >= 0 fitted to some steps.

    ``a`` and ``b`` are the least-squares fit times ``margin``, the smallest factor with which the bound is true on the
    steps of the fit. If the fit is zero (the residuals are negative on weighted average) although some residual is
    positive, ``b`` is the largest rho / |V|_2^2 and ``a`` is zero. Both are zero only if no residual is positive; then
    the linear part alone is a bound. Theorem 4 has a = O(omega^{1/3} L^2 sqrt(n m log m / d)), which comes from units
    that switch, and b = O(n L^2 m / d).
    """

    a: float
    b: float
    margin: float
    condition: float  # condition number of the fit's two columns, scaled to length 1
    steps: int

    @property
    def told_apart(self) -> bool:
        """Whether the steps determine a and b separately; with one step size, |V| ~ sqrt(F), they do not."""
        return self.condition <= COLLINEAR

    def bound(self, step: Residual) -> float:
        """Compute a sqrt(F) |V| + b |V|^2."""
        return self.a * math.sqrt(step.loss) * step.size + self.b * step.size**2

    def use(self, steps: Sequence[Residual]) -> list[float]:
        """Compute rho / bound for each resolved step; 1 means that the bound is attained.

        If the bound is zero, a positive rho counts as infinite and any other rho as 0.
        """
        return [_share(step.value, self.bound(step)) for step in steps if step.resolved]

    def judge(self, held_out: Sequence[Residual]) -> Criterion:
        """Judge the fitted bound on steps outside the fit: ``consistent`` or ``refuted``, never ``certified``.

        The verdict is about the fitted a and b. The constants of the theorem are unspecified, so the theorem is not
        judged.
        """
        used = self.use(held_out)
        largest = max(used, default=math.nan)
        return at_most("semi_smoothness", SOURCE, f"{ASKS} with the fitted a, b", largest, 1.0)


def fit_semi_smoothness(steps: Sequence[Residual]) -> SemiSmoothness:
    r"""Fit rho / (sqrt(F) |V|) ~ a + b |V| / sqrt(F) by non-negative least squares, and scale the fit up to a bound.

    Dividing by sqrt(F) |V| gives every step the same weight, from the first to the last of a training run. The steps
    determine a and b separately only if they differ in |V| / sqrt(F): take each direction at several lengths.

    Args:
        steps: Two or more steps with a resolved residual; other steps are left out.

    Raises:
        ValueError: Fewer than two steps are left.
    """
    from scipy.optimize import nnls  # a slow import that nothing else here needs

    kept = [step for step in steps if step.resolved and step.size > 0 and step.loss > 0]
    if len(kept) < 2:
        raise ValueError(f"steps: {len(kept)} of {len(steps)} stand above rounding; need two or more, or longer steps")
    length = np.array([step.size / math.sqrt(step.loss) for step in kept])
    wanted = np.array([step.value / (math.sqrt(step.loss) * step.size) for step in kept])
    scale = float(np.sqrt(np.mean(length**2)))  # so that both columns have the same length
    columns = np.stack([np.ones_like(length), length / scale], 1)
    a, b = (float(each) for each in nnls(columns, wanted)[0])
    condition = float(np.linalg.cond(columns))
    # Negative on weighted average: the least-squares fit is no bound if a single residual is positive.
    if a == b == 0:
        largest = max(step.value / step.size**2 for step in kept)
        return SemiSmoothness(0.0, max(largest, 0.0), 1.0, condition, len(kept))
    margin = max(float(np.max(wanted / (columns @ np.array([a, b])))), 1.0)
    return SemiSmoothness(margin * a, margin * b / scale, margin, condition, len(kept))


def _share(value: float, bound: float) -> float:
    if bound > 0:
        return value / bound
    return math.inf if value > 0 else 0.0
