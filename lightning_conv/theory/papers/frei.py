"""Nearly orthogonal data and low rank (Frei et al. 2023; Kou, Chen & Gu 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.rounding import (
    FEW,
    exponent_of,
    gamma,
    ldexp,
    product_down,
    product_up,
    quotient_down,
    quotient_up,
)
from lightning_conv.theory.criterion import Criterion, at_least

BLOCK = 1024
UNDERFLOW = 1e-300
"""Upper bound of what underflow can take from a square or a product of rows whose largest entry is about 1."""
FREI = "Frei, Vardi, Bartlett, Srebro, Hu 2023 (2210.07082)"
KOU = "Kou, Chen, Gu 2023 (2310.18935)"


@dataclass(frozen=True)
class NearOrthogonality:
    """Ratio kappa of squared norms to inner products of n inputs; the larger kappa, the closer they are to orthogonal."""

    kappa: Bounded  # min_i |x_i|^2 / (n max_{i != k} |x_i . x_k|); infinite for orthogonal inputs
    pair: tuple[int, int]  # the samples with the largest |x_i . x_k|
    smallest: float  # R_min = min |x_i|
    largest: float  # R_max = max |x_i|

    def criteria(self, slope: float, *, constant: float = 1.0) -> list[Criterion]:
        r"""Judge the conditions on the data of both papers, kappa >= C.

        Frei et al. have C = 3 gamma^{-3} (R_max/R_min)^2, that is R_min^2 >= 3 gamma^{-3} (R_max/R_min)^2 n max |x_i .
        x_k|. Kou et al. leave C unspecified; ``constant`` takes its place. ``certified`` means proven for the inputs as
        float64 numbers. Data that are not nearly orthogonal refute the hypothesis and not the conclusion.

        Args:
            slope: gamma of the leaky ReLU; for 0 (the ReLU) the theorem of Frei et al. does not apply.
            constant: The unspecified constant C of Kou et al.

        Returns:
            The condition of Kou et al., then, for gamma > 0, that of Frei et al.
        """
        asks = "|x_i|^2 >= C n max |x_i . x_k|"
        kou = at_least("near_orthogonality_kou", KOU, f"{asks}, C = {constant:g}", self.kappa, constant, proves=True)
        if slope <= 0:
            return [kou]
        # The last factor covers the rounding of both norms, for inputs of up to a million numbers.
        bound = 3 / slope**3 * (self.largest / self.smallest) ** 2 * OUTWARD if self.smallest > 0 else math.inf
        asks = f"{asks}, C = 3 gamma^-3 (R_max/R_min)^2"
        return [kou, at_least("near_orthogonality", FREI, asks, self.kappa, bound, proves=True)]


def near_orthogonality(inputs: Tensor, *, block: int = BLOCK) -> NearOrthogonality:
    r"""Compute kappa = min_i |x_i|^2 / (n max_{i != k} |x_i . x_k|) of n inputs, with a proven interval.

    The rounding error of a product of d terms is at most gamma_d |x_i||x_k|.

    Args:
        inputs: Samples, (n, ...), n >= 2; flattened, computed in float64.
        block: Number of rows that are multiplied at once.

    Raises:
        ValueError: There are fewer than two inputs, or an entry is NaN or infinite.

    Cost: n^2 d flops; O(block^2 + n d) memory.

    Example:
        >>> near_orthogonality(torch.tensor([[2.0, 0.0], [1.0, 2.0]])).kappa.value
        1.0
    """
    if inputs.ndim < 2 or len(inputs) < 2:
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; need two or more samples along dimension 0")
    x = inputs.detach().double().flatten(1)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("inputs: contain NaN or infinity; remove these samples")
    n, d = x.shape
    # kappa has no scale: a power of two changes no digit, and the largest squares then neither vanish nor overflow.
    exponent = exponent_of(x)
    x = ldexp(x, -exponent)
    relative = gamma(d + 2, torch.float64)
    squares = x.square().sum(1)
    norms = squares.sqrt()
    largest, upper, lower, pair = -1.0, 0.0, 0.0, (0, 1)
    for first in range(0, n, block):
        mine = slice(first, first + block)
        for second in range(first, n, block):
            theirs = slice(second, second + block)
            products = (x[mine] @ x[theirs].T).abs()
            error = relative * norms[mine, None] * norms[None, theirs] * (1 + relative) + UNDERFLOW
            if first == second:
                above = torch.ones_like(products, dtype=torch.bool).tril()
                products[above], error[above] = -1.0, 0.0
            upper = max(upper, float((products + error).max()))
            lower = max(lower, float((products - error).max()))
            row, column = divmod(int(products.argmax()), products.shape[1])
            if float(products[row, column]) > largest:
                largest, pair = float(products[row, column]), (first + row, second + column)
    least = float(squares.min())
    low, high = max(least * (1 - 2 * relative) - UNDERFLOW, 0.0), least * (1 + 2 * relative) + UNDERFLOW
    ends = (
        _over(least, n * largest),
        quotient_down(low, product_up(n, upper)),
        quotient_up(high, product_down(n, lower)) if lower > 0 else math.inf,
    )
    kappa = Bounded(*ends, certified=True, method="all products, with their rounding")
    smallest, greatest = (math.ldexp(size, exponent) for size in (math.sqrt(least), float(norms.max())))
    return NearOrthogonality(kappa, pair, smallest, greatest)


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf


def stable_rank_bound(inputs: Tensor, slope: float, weights: Tensor) -> float:
    r"""Bound the stable rank of the movement W - W_0 of a two-layer leaky ReLU network, for all activation patterns.

    Gradient descent moves w_j by a_j sum_i y_i c_ij x_i with c_ij between gamma A_i and A_i, where A_i is the sum of
    the loss derivatives |l'(y_i f(x_i))| of sample i over the steps. With q = gamma min A / max A,

    .. math:: \frac{|W - W_0|_F^2}{|W - W_0|_2^2} \le
              \frac{\lambda_{\max}(X X^T)}{\lambda_{\min}(X X^T)} \cdot \frac{(1 + q)^2}{4 q}:

    |sum_i y_i c_i x_i|^2 is at most lambda_max |c|^2; its part along X_y^T (X_y X_y^T)^{-1} 1 is at least (sum c_i)^2 lambda_min / n; and
    n |c|^2 <= (1 + q)^2 / (4 q) (sum c_i)^2 for numbers within a factor q (Kantorovich). [derived] For orthonormal
    inputs, gamma = 1/2 and equal A_i the bound is 9/8: the low stable rank after the first step of Frei et al., with
    its constant.

    Args:
        inputs: X, (n, d).
        slope: gamma, in (0, 1].
        weights: A_i > 0, n numbers.

    Returns:
        The bound; infinite if X X^T is singular or gamma is 0.
    """
    x, a = inputs.detach().double().flatten(1), weights.detach().double()
    eigenvalues = torch.linalg.eigvalsh(x @ x.T)
    q = slope * float(a.min() / a.max())
    error = gamma(x.shape[1] + len(x), torch.float64) * float(eigenvalues.sum())
    least, most = float(eigenvalues[0]) - error, float(eigenvalues[-1]) + error
    return most / least * (1 + q) ** 2 / (4 * q) * FEW if q > 0 and least > 0 else math.inf


def patterns_settle(
    orthogonality: NearOrthogonality, slope: float, weights: Tensor, scale: float, start: float
) -> bool:
    r"""Decide whether the sign of every unit j on every sample i is certainly sign(a_j y_i).

    By the movement in ``stable_rank_bound``, y_i sign(a_j) w_j . x_i is at least scale (gamma A_i |x_i|^2 - sum_{k !=
    i} A_k |x_k . x_i|) minus its size at the start. From then on all units with the same sign of a_j have the same
    gradient over a_j, so the further movement has at most rank two. This is the rank two of the limit, after finitely
    many steps.

    Args:
        orthogonality: ``near_orthogonality`` of the inputs.
        slope: Slope gamma of the leaky ReLU for negative inputs.
        weights: The sums A_i of the loss derivatives so far, n numbers.
        scale: Step size times |a_j| times 1/n.
        start: max |w_j(0) . x_i|.
    """
    least, most = float(weights.min()), float(weights.max())
    if not orthogonality.kappa.lower > 0:
        return False
    square = orthogonality.smallest**2
    across = square / orthogonality.kappa.lower * most * OUTWARD  # n max |x_k . x_i| <= R_min^2 / kappa
    return scale * (slope * least * square / OUTWARD - across) > start * OUTWARD


@dataclass(frozen=True)
class Margins:
    """y_i f(x_i) over the samples."""

    smallest: float
    largest: float

    @property
    def spread(self) -> float:
        """Smallest over largest margin: 1 if all margins are equal, negative if a sample is misclassified."""
        return self.smallest / self.largest if self.largest != 0 else math.nan


def margins(outputs: Tensor, targets: Tensor, *, norm: float = 1.0) -> Margins:
    """Compute the margins of a classifier with outputs f and targets -1 and 1.

    In the limit of gradient flow every sample is a support vector, y_i f(x_i) = const, so ``spread`` tends to 1 (Frei
    et al., after Theorem 3.2). Kou et al. show the same for gradient descent.

    Args:
        outputs: f(x_i), n numbers.
        targets: y_i, -1 or 1.
        norm: Divisor of the margins: |W|_F for the normalised margins of a network that is homogeneous of degree 1 in
            W.

    Raises:
        ValueError: A target is neither -1 nor 1, or the numbers of targets and outputs differ.
    """
    f, y = outputs.detach().double().flatten(), targets.detach().double().flatten()
    if f.shape != y.shape or not bool((y.abs() == 1).all()):
        raise ValueError(f"targets: {len(y)} for {len(f)} outputs; need -1 or 1 for each")
    m = y * f / norm
    return Margins(float(m.min()), float(m.max()))


def linear_agreement(outputs: Tensor, inputs: Tensor, direction: Tensor) -> float:
    """Compute the share of samples with sign f(x) = sign(z . x); 1 for a linear decision boundary with normal z.

    Args:
        outputs: f(x_i), n numbers.
        inputs: Samples, (n, d).
        direction: z, (d,), such as ``LeakyTwoLayer.linear_part()``.
    """
    x = inputs.detach().double().flatten(1)
    return float(((x @ direction.double() > 0) == (outputs.detach().double().flatten() > 0)).double().mean())
