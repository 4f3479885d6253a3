"""The contraction of the error, over a run and per step, and the remainder of the linearisation.

"Deep" is Du, Lee, Li, Wang, Zhai 2019 (1811.03804), "two layers" is Du, Zhai, Poczos, Singh 2019 (1810.02054).

Notation: r = u - y, S = 1/2 |r|^2, and eta is the step size on S. For a run on another squared loss k S,
``loss_scale(...).step_on_sum(eta)`` converts the step size. Ratios of losses do not depend on k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.drift import frobenius_floor
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.eigenvalues.bounded import Bounded, divide
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.papers.du.kernel import DEEP, TWO_LAYER

ASKS_REMAINDER = "|u(k+1) - u(k) + eta G(k) r(k)| / |r(k)| <= eta lambda_0 / 8"
ASKS_CHANGE = "|u(k+1) - u(k)|^2 / |r(k)|^2 <= eta lambda_0 / 8"
THEOREMS = f"{DEEP}, Theorems 5.1, 6.1, 7.1; {TWO_LAYER}, Theorem 4.1"


def contraction_criterion(losses: Sequence[float] | Tensor, step: float, lambda_0: Bounded | float) -> Criterion:
    """Judge the theorems' conclusion along a whole run: L(k) <= (1 - eta lambda_0 / 2)^k L(0) at every step k.

    Args:
        losses: L(0), L(1), ... of consecutive steps of gradient descent, in any scale of the squared loss.
        step: Step size eta on S.
        lambda_0: lambda_min of the limit kernel.

    Returns:
        The criterion. ``measured`` is the logarithm of the largest ratio of the two sides over all k >= 1, so that
        nothing underflows; the bound is 0.

    Raises:
        ValueError: There are fewer than two losses, a loss is negative or NaN, the first one is not positive, or
            eta lambda_0 / 2 lies outside (0, 1).

    Source: deep, Theorems 5.1, 6.1, 7.1; two layers, Theorem 4.1.

    Example:
        >>> contraction_criterion([1.0, 0.7, 0.5], step=0.5, lambda_0=1.0).verdict  # 0.7 <= 0.75 and 0.5 <= 0.75^2
        'consistent'
    """
    values = torch.as_tensor(losses, dtype=torch.float64).flatten()
    if len(values) < 2 or not (float(values[0]) > 0 and bool((values >= 0).all())):
        raise ValueError(f"losses: {len(values)} numbers; need two or more, none negative or NaN, the first above zero")
    k = torch.arange(1, len(values), dtype=torch.float64)
    excess = (values[1:] / values[0]).log() - k * _log_rate(step, lambda_0)
    asks = "log L(k) / L(0) - k log(1 - eta lambda_0 / 2) <= 0 at every step k"
    return at_most("contraction", THEOREMS, asks, float(excess.max()), 0.0)


def step_criterion(before: float, after: float, step: float, lambda_0: Bounded | float) -> Criterion:
    """Judge L(k+1) / L(k) <= 1 - eta lambda_0 / 2 for one step.

    This is more than the theorems conclude; it is the step of their induction.

    Args:
        before: L(k), in any scale of the squared loss.
        after: L(k+1), in the same scale.
        step: Step size eta on S.
        lambda_0: lambda_min of the limit kernel.

    Raises:
        ValueError: eta lambda_0 / 2 lies outside (0, 1).

    Example:
        >>> step_criterion(before=1.0, after=0.7, step=0.5, lambda_0=1.0).bound
        0.75
    """
    _log_rate(step, lambda_0)
    return step_contraction_criterion(divide(after, before), step, lambda_0)


def step_contraction_criterion(contraction: float, step: float, lambda_0: Bounded | float) -> Criterion:
    """Judge ``step_criterion`` from a quotient that is already computed; the verdict includes the error of lambda_0.

    Args:
        contraction: L(k+1) / L(k).
        step: Step size eta on S; NaN: not known.
        lambda_0: lambda_min of the limit kernel.
    """
    lower = upper = contraction
    if isinstance(lambda_0, Bounded):
        lower -= step * (lambda_0.value - lambda_0.lower) / 2
        upper += step * (lambda_0.upper - lambda_0.value) / 2
    measured = Bounded(contraction, lower, upper, certified=False, method="error of lambda_0")
    bound = 1 - step * _value(lambda_0) / 2
    return at_most("step_contraction", THEOREMS, "L(k+1) / L(k) <= 1 - eta lambda_0 / 2", measured, bound)


def linearised_rate(gram: KernelGram | Tensor, residual: Tensor, step: float) -> float:
    r"""Compute 2 eta r^T G r / |r|^2, the share of the loss that a step removes to first order in eta.

    It always lies between 2 eta lambda_min and 2 eta lambda_max of G.

    Args:
        gram: The current kernel G over all trained parameters, (n, n).
        residual: r = u - y, (n,).
        step: Step size eta on S.

    Raises:
        ValueError: The sizes differ.

    Example:
        >>> import torch
        >>> gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> linearised_rate(gram, torch.tensor([1.0, 0.0], dtype=torch.float64), step=0.1)
        0.2
    """
    matrix, r = _matrix_and_residual(gram, residual)
    return 2 * step * divide(float(r @ matrix @ r), float(r @ r))


@dataclass(frozen=True)
class Linearisation:
    """One step u -> u' of gradient descent compared with its linearisation u - eta G r."""

    remainder: float  # |I_2| = |u' - u + eta G r|
    change: float  # |u' - u|
    predicted_change: float  # eta |G r|
    residual: float  # |r|
    rounding: float = 0.0  # estimated contribution of rounding to the remainder and to the change

    @property
    def resolved(self) -> bool:
        """Whether the predicted change is well above rounding; the relative remainder is then known to within 0.01."""
        return self.predicted_change > 100 * self.rounding

    @property
    def relative(self) -> float:
        """Remainder over the predicted change."""
        return divide(self.remainder, self.predicted_change)


def linearisation(
    before: Tensor, after: Tensor, targets: Tensor, gram: KernelGram | Tensor, step: float, *, rounding: float = 0.0
) -> Linearisation:
    """Measure the difference between a step and its linearisation.

    Args:
        before: u(k), (n,); for C outputs (n, C), in which case the kernel is the full one with row i C + c.
        after: u(k+1), of the same shape.
        targets: y, of the same shape.
        gram: G(k) over all trained parameters, (n, n) or (n C, n C).
        step: Step size eta on S.
        rounding: Rounding error of the change of the outputs; that of the kernel is added to it.

    Raises:
        ValueError: The sizes differ.

    Source: deep, proof of Lemma B.6: u(k+1) - u(k) = I_1 + I_2 with I_1 = -eta G(k) r(k).
    """
    matrix, r = _matrix_and_residual(gram, before.detach().double() - targets.double())
    change = (after.detach().double() - before.detach().double()).flatten()
    linear = -step * (matrix @ r)
    size = float(r.norm())
    rounding += step * frobenius_floor(gram) * size
    return Linearisation(
        float((change.to(linear) - linear).norm()), float(change.norm()), float(linear.norm()), size, rounding
    )


def linearisation_criteria(found: Linearisation, step: float, lambda_0: Bounded | float) -> tuple[Criterion, Criterion]:
    """Judge |I_2| <= eta lambda_0 / 8 |r| (Lemma B.6) and |u(k+1) - u(k)|^2 <= eta lambda_0 / 8 |r|^2 (Lemma B.7).

    I_2 is the remainder of the linearisation. The measured numbers are divided by |r| and |r|^2. Together with
    lambda_min(G) >= lambda_0 / 2 the two inequalities give the contraction of the step. The verdicts include the
    rounding of the step and the error of lambda_0.

    Args:
        found: The step, by ``linearisation``.
        step: Step size eta on S.
        lambda_0: lambda_min of the limit kernel.

    Returns:
        The criteria ``linearisation_remainder`` (Lemma B.6) and ``output_change`` (Lemma B.7), in this order.
    """
    bound = step * _value(lambda_0) / 8
    share, change = divide(found.remainder, found.residual), divide(found.change, found.residual)
    error = divide(found.rounding, found.residual) if found.rounding > 0 else 0.0
    squares = (change**2, max(change - error, 0.0) ** 2, (change + error) ** 2)
    remainder = _within((share, max(share - error, 0.0), share + error), lambda_0)
    return (
        at_most("linearisation_remainder", f"{DEEP}, Lemma B.6", ASKS_REMAINDER, remainder, bound),
        at_most("output_change", f"{DEEP}, Lemma B.7", ASKS_CHANGE, _within(squares, lambda_0), bound),
    )


def _within(measured: tuple[float, float, float], lambda_0: Bounded | float) -> Bounded:
    """Return a number with its interval, widened by the error that lambda_0 causes in the bound of the comparison."""
    value, lower, upper = measured
    if isinstance(lambda_0, Bounded):
        lower = lower * lambda_0.value / lambda_0.upper if lambda_0.upper > 0 else 0.0
        upper = upper * lambda_0.value / lambda_0.lower if lambda_0.lower > 0 else math.inf
    return Bounded(value, lower, upper, certified=False, method="rounding of the step, error of lambda_0")


def _log_rate(step: float, lambda_0: Bounded | float) -> float:
    share = step * _value(lambda_0) / 2
    if not 0 < share < 1:
        raise ValueError(
            f"step: eta lambda_0 / 2 = {share:.3g}; the rate 1 - eta lambda_0 / 2 needs it between 0 and 1"
        )
    return math.log1p(-share)


def _value(lambda_0: Bounded | float) -> float:
    return lambda_0.value if isinstance(lambda_0, Bounded) else lambda_0


def _matrix_and_residual(gram: KernelGram | Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    matrix = gram.matrix if isinstance(gram, KernelGram) else gram.double()
    r = residual.detach().double().flatten()
    if len(r) != len(matrix):
        raise ValueError(
            f"residual: {len(r)} numbers for a kernel of {len(matrix)} rows; need one for each sample and output"
        )
    return matrix, r.to(matrix.device)
