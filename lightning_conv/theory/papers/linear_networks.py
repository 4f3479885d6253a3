"""Linear networks u = W_L ... W_1 x: the balancedness, which gradient flow conserves, and the modes of the product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_conv.theory.criterion import Criterion, at_most

SOURCE = "Arora, Cohen, Hazan 2018, Theorem 1; Du, Hu, Lee 2018, Theorem 2.2"


def balancedness(weights: Sequence[Tensor]) -> list[Tensor]:
    r"""Compute D_l = W_{l+1}^T W_{l+1} - W_l W_l^T for l = 1..L-1.

    D_l is constant along gradient flow on any loss of the product. With P the gradient with respect to the product, A
    the product of the later weights and B that of the earlier ones, the gradient G_l = dL/dW_l = A^T P B^T satisfies
    W_{l+1}^T G_{l+1} = G_l W_l^T, so dD_l/dt = 0. (ReLU networks conserve the diagonal of D_l, and therefore
    |W_{l+1}|_F^2 - |W_l|_F^2: Du, Hu, Lee 2018.)

    Args:
        weights: W_1..W_L in the order in which they are applied, W_l of shape (size_l, size_{l-1}).

    Raises:
        ValueError: There are fewer than two matrices, or their sizes do not match.

    Cost: 2 m^3 flops per layer of width m.
    """
    w = _chain(weights)
    return [above.T @ above - below @ below.T for below, above in pairwise(w)]


def balancedness_step(gradients: Sequence[Tensor], eta: float) -> list[Tensor]:
    r"""Compute the change of D_l in one step of gradient descent: exactly eta^2 (G_{l+1}^T G_{l+1} - G_l G_l^T).

    The terms of first order cancel (see ``balancedness``). Over a time T = k eta, D_l therefore changes by a sum of k
    terms of order eta^2, that is by O(eta).

    Args:
        gradients: G_l = dL/dW_l, l = 1..L.
        eta: Step size of plain gradient descent.

    Raises:
        ValueError: see ``balancedness``.
    """
    return [eta**2 * part for part in balancedness(gradients)]


def drift_bound(gradients: Sequence[Tensor], eta: float) -> float:
    """Compute eta^2 max_l max(|G_{l+1}|_F^2, |G_l|_F^2), which bounds the change of every D_l in one step.

    The norm of the change is the spectral norm. The change is the difference of two positive semidefinite matrices, so
    its norm is at most the larger of their norms.
    """
    squares = [float(gradient.double().square().sum()) for gradient in gradients]
    return eta**2 * max(squares)


def stays_balanced(now: Sequence[Tensor], then: Sequence[Tensor], bound: float) -> Criterion:
    """Judge max_l |D_l - D_l(0)|_2 against the sum of ``drift_bound`` over the steps in between.

    Args:
        now: W_1..W_L.
        then: W_1..W_L at the start.
        bound: Sum of ``drift_bound`` over the steps. It is valid for plain gradient descent on any loss of the product and any
            data.

    Raises:
        ValueError: see ``balancedness``.
    """
    moved = max(
        float(torch.linalg.matrix_norm(d - start, 2))
        for d, start in zip(balancedness(now), balancedness(then), strict=True)
    )
    asks = "|D_l(t) - D_l(0)|_2 <= sum_t eta^2 max_l |G_l|_F^2"
    return at_most("balancedness", SOURCE, asks, moved, bound)


def end_to_end(weights: Sequence[Tensor]) -> Tensor:
    """Compute the product W_L ... W_1, (outputs, inputs); its rank is at most the smallest size of the factors.

    Raises:
        ValueError: There is no matrix, or the sizes do not match.
    """
    product, *rest = _chain(weights, least=1)
    for weight in rest:
        product = weight @ product
    return product


def mode_strength(time: Tensor, start: float, target: float, *, layers: int = 2) -> Tensor:
    r"""Compute a singular value a(t) of the product of a balanced linear network under gradient flow.

    The loss is (1/2)|W_L...W_1 - Y|_F^2. If the start is aligned with the singular vectors of Y, the modes decouple:
    a' = L a^{2 - 2/L} (s - a) for a singular value s of Y. For L = 2 the solution is a logistic curve, for L = 1 an
    exponential:

    .. math:: a(t) = \frac{s\, e^{2 s t}}{e^{2 s t} - 1 + s / a_0}, \qquad a(t) = s - (s - a_0) e^{-t} \; (L = 1).

    For L = 2 a mode of strength s appears after a time of about (1/2s) ln(s/a_0). Strong modes appear first, so the
    rank grows step by step.

    Args:
        time: Times t.
        start: a_0 > 0 (any number for L = 1).
        target: Singular value s > 0 of Y, the limit of a(t).
        layers: Number L of layers, 1 or 2.

    Raises:
        ValueError: ``layers`` is neither 1 nor 2 (there is no closed form), or ``start`` or ``target`` is not positive.

    Source: Saxe, McClelland, Ganguli 2014, equation (6), for inputs with identity covariance.
    """
    t = time.double()
    if layers == 1:
        return target - (target - start) * torch.exp(-t)
    if layers != 2:
        raise ValueError(f"layers: {layers}; the closed form exists for 1 and 2 only")
    if not (start > 0 and target > 0):
        raise ValueError(f"start, target: {start}, {target}; need positive numbers")
    return target / (1 + (target / start - 1) * torch.exp(-2 * target * t))


def _chain(weights: Sequence[Tensor], least: int = 2) -> list[Tensor]:
    shapes = [tuple(w.shape) for w in weights]
    fits = all(len(shape) == 2 for shape in shapes) and all(a[0] == b[1] for a, b in pairwise(shapes))
    if len(shapes) < least or not fits:
        raise ValueError(f"weights: shapes {shapes}; need W_1..W_L, {least} or more, each (size_l, size_(l-1))")
    return [w.detach().double() for w in weights]
